"""crop_resize against Pillow, one axis at a time: the C++ stays within one grey level of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_fast.backend import use_backend
from stellar_fast.ops.crop_resize import crop_resize

BACKENDS = ("cpu", "reference")


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth structure with noise on top, saturated in places, so that the filter's overshoot is cut."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 128 + 150 * np.sin(x / 7 + np.array([0, 1, 2])[:, None, None]) * np.cos(y / 5)
    return (waves + rng.normal(0, 30, waves.shape)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def pillow(image: np.ndarray, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    crop = crop.resize((size, height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop).transpose(2, 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 32, 95, 224])
def test_within_one_grey_level_of_pillow(backend: str, size: int) -> None:
    image = photo(131, 173)
    boxes = [(0, 0, 131, 173), (3, 5, 1, 1), (130, 172, 1, 1), (7, 9, 2, 3), (10, 11, 3, 150), (0, 60, 131, 17)]
    boxes += [(20, 30, 95, 95), (31, 0, 64, 80), (0, 0, 33, 31)]
    flips = [i % 2 == 1 for i in range(len(boxes))]
    with use_backend(crop_resize=backend):
        views = crop_resize(image, boxes, flips, size)
    assert views.shape == (len(boxes), 3, size, size) and views.dtype == torch.uint8
    for view, box, flip in zip(views.numpy(), boxes, flips, strict=True):
        expected = pillow(image, box, flip, size)
        assert np.abs(view.astype(int) - expected).max() <= 1, box
        assert (view != expected).sum() <= 1 + 0.005 * view.size, box


def test_shrinks_a_large_image_by_many_taps() -> None:
    image = photo(900, 1200)
    view = crop_resize(image, [(0, 0, 900, 1200)], [False], 16)[0].numpy()
    assert np.abs(view.astype(int) - pillow(image, (0, 0, 900, 1200), False, 16)).max() <= 1


def test_a_box_of_the_views_size_is_copied() -> None:
    image = photo(40, 50)
    view = crop_resize(image, [(3, 4, 32, 32)], [True], 32)[0]
    torch.testing.assert_close(view, torch.from_numpy(image[3:35, 4:36][:, ::-1].transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_filter_ends_at_the_crop(backend: str) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    image[5:15, 5:15] = 200
    with use_backend(backend):
        view = crop_resize(image, [(5, 5, 10, 10)], [False], 37)
    assert (view == 200).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_images_and_tensors(backend: str) -> None:
    image = photo(60, 80)
    boxes, flips = [(4, 6, 30, 41), (0, 0, 60, 80)], [True, False]
    with use_backend(backend):
        expected = crop_resize(image, boxes, flips, 24)
        planes = torch.from_numpy(image.transpose(2, 0, 1).copy()).permute(1, 2, 0)
        wide = np.zeros((120, 90, 3), np.uint8)
        wide[::2, 7:87] = image
        upside_down = image[::-1].copy()[::-1]
        for same in (torch.from_numpy(image), planes, wide[::2, 7:87], upside_down):
            assert torch.equal(crop_resize(same, boxes, flips, 24), expected)
        assert torch.equal(crop_resize(image, np.array(boxes, np.int64), torch.tensor(flips), 24), expected)
    assert torch.equal(crop_resize(image, boxes[::-1], flips[::-1], 24).flip(0), crop_resize(image, boxes, flips, 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_boxes_give_no_views(backend: str) -> None:
    with use_backend(backend):
        assert crop_resize(photo(8, 8), [], [], 16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 9), np.uint8)}, r"uint8 of shape \(H, W, 3\).*\(8, 9\)"),
        ({"image": np.zeros((8, 9, 3), np.float32)}, "but is float32"),
        ({"boxes": [(0, 0, 8)]}, r"shape \(1, 3\)"),
        ({"boxes": [(0.0, 0.0, 8.0, 9.0)]}, "float64"),
        ({"boxes": [(0, 0, 8, 10)]}, r"\[0, 0, 8, 10\] must lie inside the image, which is 8 x 9"),
        ({"boxes": [(-1, 0, 8, 9)]}, "must lie inside"),
        ({"boxes": [(0, 0, 0, 9)]}, "must lie inside"),
        ({"boxes": [(2**31, 0, 2**31, 9)]}, "must lie inside"),
        ({"flips": [True, False]}, r"1 boxes but flips has shape \(2,\)"),
        ({"size": 0}, "at least 1 but is 0"),
    ],
)
def test_wrong_arguments_raise(change: dict, message: str) -> None:
    arguments = {"image": photo(8, 9), "boxes": [(0, 0, 8, 9)], "flips": [False], "size": 4, **change}
    with pytest.raises(ValueError, match=message):
        crop_resize(**arguments)
