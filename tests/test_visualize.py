import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_fast import visualize as vis

GRID = (4, 6)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture
def spatial() -> torch.Tensor:
    """Token 2 has the left half, token 0 the right but its last column, token 3 that column, token 1 nothing."""
    column = torch.arange(24) % 6
    winner = torch.where(column < 3, 2, torch.where(column < 5, 0, 3))
    return 0.9 * torch.nn.functional.one_hot(winner, 4) + 0.025


def test_shares_count_patches(spatial: torch.Tensor) -> None:
    np.testing.assert_allclose(vis.token_shares(spatial), [1 / 3, 0, 1 / 2, 1 / 6])


def test_maps_come_largest_first_and_light_up_where_the_token_is(image: np.ndarray, spatial: torch.Tensor) -> None:
    tiles = vis.token_maps(image, spatial, GRID)
    assert [caption for _, caption in tiles] == ["token 2 · 50 %", "token 0 · 33 %", "token 3 · 17 %", "token 1 · 0 %"]
    brightness = tiles[0][0].mean(axis=(0, 2))
    assert tiles[0][0].shape == image.shape and tiles[0][0].dtype == np.uint8
    assert brightness[:20].mean() > 1.8 * brightness[28:].mean()
    assert tiles[3][0].mean() < 0.6 * tiles[0][0][:, :20].mean()


def test_segmentation_takes_the_strongest_token(spatial: torch.Tensor) -> None:
    grey = np.full((32, 48, 3), 128, dtype=np.uint8)
    picture = vis.segmentation_overlay(grey, spatial, GRID)
    colours = vis.token_colours(4).astype(float)
    for column, token in ((8, 2), (32, 0), (46, 3)):
        pixel = picture[16, column].astype(float)
        distance = [np.linalg.norm((pixel - pixel.mean()) - (c - c.mean())) for c in colours]
        assert int(np.argmin(distance)) == token
    assert (picture[5] != picture[16]).sum() == 0  # the maps change from left to right alone


def test_colours_are_distinct() -> None:
    colours = vis.token_colours(16).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 1000 * np.eye(16, dtype=int)
    assert apart.min() >= 30


def test_pca_finds_the_directions_and_their_signs() -> None:
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    basis = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))[0]
    dense = column.flatten()[:, None] ** 2 * basis[0] - row.flatten()[:, None] ** 2 * basis[1]
    picture = vis.pca_rgb(dense, GRID)
    assert picture.shape == (4, 6, 3)
    assert (np.diff(picture[..., 0].astype(int), axis=1) > 0).all()  # the strongest direction is red and grows with it
    assert (np.diff(picture[..., 0].astype(int), axis=0) == 0).all()
    assert (np.diff(picture[..., 1].astype(int), axis=0) > 0).all()
    assert (picture[..., 2] == 128).all()  # there is no third direction
    np.testing.assert_array_equal(picture, vis.pca_rgb(dense + 7, GRID))
    assert vis.pca_rgb(dense, GRID, (20, 30)).shape == (20, 30, 3)


def test_pca_of_constant_features_is_flat() -> None:
    assert len(np.unique(vis.pca_rgb(torch.ones(24, 8), GRID))) == 1


def test_psnr() -> None:
    black, grey = np.zeros((2, 2, 3), dtype=np.uint8), np.full((2, 2, 3), 51, dtype=np.uint8)
    assert vis.psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert vis.psnr(black, black) == np.inf
    with pytest.raises(ValueError, match=r"\(2, 2, 3\) and \(1, 2, 3\)"):
        vis.psnr(black, black[:1])


def test_to_pixels() -> None:
    image = torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1)
    assert vis.to_pixels(image).tolist() == [[[0, 128, 255]]]
    assert vis.to_pixels((image * 100).to(torch.uint8)).tolist() == [[[0, 50, 200]]]


def test_panel_shows_everything(tmp_path: Path, image: np.ndarray, spatial: torch.Tensor) -> None:
    dense = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    path = vis.save_panel(tmp_path / "new" / "panel.png", image, spatial, dense, GRID, title="photo.jpg", width=800)
    with Image.open(path) as panel:
        assert panel.width == 800 and panel.height > 300
        assert len(panel.getcolors(1_000_000)) > 500
    assert [file.name for file in path.parent.iterdir()] == ["panel.png"]
    wide = vis.panel(image, spatial, dense, GRID, reconstruction=np.zeros((16, 24, 3), dtype=np.uint8), width=800)
    assert wide.height < panel.height  # four pictures in the first row are smaller than three, and there is no title


def test_a_grid_that_does_not_fit_is_named(image: np.ndarray, spatial: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(24, 4\) are not \(P, ...\) with P = 4 x 4"):
        vis.panel(image, spatial, torch.randn(24, 8), (4, 4))


def test_a_picture_says_what_it_is_and_replaces_its_kind_alone(tmp_path: Path, image: np.ndarray) -> None:
    path = vis.save_image(tmp_path / "new" / "a.png", image)
    with Image.open(path) as picture:
        assert picture.info["Software"] == "a picture written by stellar_fast"
        np.testing.assert_array_equal(np.asarray(picture), image)
    assert b"written by stellar_fast" in path.read_bytes()[:100]  # also where a large picture follows
    link = tmp_path / "link.png"
    link.symlink_to(path)
    assert vis.save_image(link, 255 - image) == link and link.is_symlink()
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), 255 - image)
    Image.fromarray(image).save(path)  # a photo, from here on
    photo = path.read_bytes()
    with pytest.raises(ValueError, match="exists and was not written by stellar_fast as a picture: "):
        vis.save_image(path, image)
    assert path.read_bytes() == photo
    vis.save_image(path, image, overwrite=True)
    assert path.read_bytes() != photo


def test_a_title_of_any_bytes_is_one_line(image: np.ndarray) -> None:
    name = os.fsdecode(b"two\nlines \xe9\x1b.png")
    titles = [np.asarray(vis.grid_figure([[(image, text)]], 300, text)) for text in (name, r"two\nlines \xe9\x1b.png")]
    np.testing.assert_array_equal(*titles)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(image: np.ndarray, spatial: torch.Tensor, value: float) -> None:
    with pytest.raises(ValueError, match="1 of 12 values of an image are not finite"):
        vis.to_pixels(torch.tensor([value] + [0.5] * 11).view(3, 2, 2))
    dense = torch.ones(24, 8)
    dense[3:5, 1] = value
    with pytest.raises(ValueError, match="features of 2 of 24 patches are not finite"):
        vis.panel(image, spatial, dense, GRID)
    with pytest.raises(ValueError, match="features of 2 of 24 patches are not finite"):
        vis.panel(image, dense[:, :4], torch.ones(24, 8), GRID)
