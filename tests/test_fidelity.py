import numpy as np
import pytest
from skimage.data import astronaut, chelsea
from skimage.metrics import structural_similarity

from stellar_fast import fidelity as fid
from stellar_fast.visualize import psnr


@pytest.fixture
def image() -> np.ndarray:
    return astronaut()[100:164, 180:250]


@pytest.fixture
def other(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    return (0.8 * image + 30 + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(11, 11), (64, 70), (12, 40)])
def test_ssim_is_that_of_scikit_image(image: np.ndarray, other: np.ndarray, size: tuple[int, int]) -> None:
    for a, b in ((image, other), (image, chelsea()[:64, :70]), (other, np.zeros_like(other))):
        a, b = a[: size[0], : size[1]], b[: size[0], : size[1]]
        expected = structural_similarity(
            *(x / 255 for x in (a, b)),
            channel_axis=2,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert fid.ssim(a, b) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_equals_is_one_and_of_opposites_is_negative(image: np.ndarray) -> None:
    assert fid.ssim(image, image) == pytest.approx(1, abs=1e-12)
    assert fid.ssim(image, 255 - image) < 0


def test_ssim_says_what_it_cannot_compare(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(64, 70, 3\) and \(64, 69, 3\)"):
        fid.ssim(image, image[:, 1:])
    with pytest.raises(ValueError, match=r"an image of 64x10 has no SSIM: its windows are 11x11"):
        fid.ssim(image[:, :10], image[:, :10])


def test_error_map_goes_from_black_to_white(image: np.ndarray) -> None:
    assert not fid.error_map(image, image).any()
    grey = np.full((1, 5, 3), 100, dtype=np.uint8)
    off = grey + np.array([0, 10, 21, 43, 64], dtype=np.uint8)[None, :, None]
    ours, mirrored = fid.error_map(grey, off), fid.error_map(off, grey)
    np.testing.assert_array_equal(ours, mirrored)
    assert ours[0].tolist() == [[0, 0, 0], [120, 0, 0], [252, 0, 0], [255, 255, 6], [255, 255, 255]]


def test_fidelity_measures_the_whole_and_every_part(image: np.ndarray, other: np.ndarray) -> None:
    found = fid.fidelity(image, other, [image, other])
    assert found == fid.Fidelity(psnr(image, other), fid.ssim(image, other), (np.inf, psnr(image, other)))
    assert fid.fidelity(image, other).token_psnr_db == ()


def test_panel_shows_the_most_missed_token_first(
    image: np.ndarray, other: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = [other, np.zeros_like(image), np.full_like(image, 128)]
    found = fid.fidelity(image, other, without)
    drawn: list = []
    draw = fid.grid_figure
    monkeypatch.setattr(fid, "grid_figure", lambda rows, *rest: (drawn.extend(rows), draw(rows, *rest))[1])
    figure = fid.fidelity_panel(image, other, without, found, title="photo.jpg", width=800)
    assert figure.width == 800 and len(figure.getcolors(1_000_000)) > 500
    first, tokens = drawn
    assert first[1][1] == f"reconstruction · {found.psnr_db:.2f} dB · SSIM {found.ssim:.3f}"
    black, grey = (db - found.psnr_db for db in found.token_psnr_db[1:])
    assert black < grey < 0
    captions = [f"token 1 · {black:+.2f} dB", f"token 2 · {grey:+.2f} dB", "token 0 · +0.00 dB"]
    assert [caption for _, caption in tokens[:3]] == captions
    assert tokens[0][0] is without[1]
    assert len(tokens) == 8 and all((pixels == 255).all() for pixels, _ in tokens[3:])


def test_panel_counts_its_pictures(image: np.ndarray) -> None:
    found = fid.fidelity(image, image, [image])
    with pytest.raises(ValueError, match="there are 2 pictures without a token but 1 PSNRs"):
        fid.fidelity_panel(image, image, [image, image], found)
