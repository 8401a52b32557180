"""Views: sizes, seeds, the law of the random boxes, and where they come from."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_fast.data import MultiViewTransform, eval_transform
from stellar_fast.data.transform import centre_square, random_box


def picture(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack((255 * x / (width - 1), 255 * y / (height - 1), 0 * x + 90), axis=2)
    return Image.fromarray(pixels.round().astype(np.uint8))


def test_shapes_and_dtype() -> None:
    views = MultiViewTransform(32, 16, 3, 5)(picture(50, 70), seed=1)
    assert list(views) == ["global_views", "local_views"]
    assert views["global_views"].shape == (3, 3, 32, 32) and views["global_views"].dtype == torch.uint8
    assert views["local_views"].shape == (5, 3, 16, 16) and views["local_views"].dtype == torch.uint8
    assert MultiViewTransform(32, 16, 1, 0)(picture(50, 70), seed=1)["local_views"].shape == (0, 3, 16, 16)


def test_the_seed_decides_alone() -> None:
    transform, image = MultiViewTransform(24, 12, 4, 4), picture(50, 70)
    first = transform(image, seed=5)
    random.seed(0)
    torch.manual_seed(0)
    same, other = transform(np.asarray(image), seed=5), transform(image, seed=6)
    for name in first:
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
    assert len({view.numpy().tobytes() for view in first["local_views"]}) == 4


def test_view_0_is_drawn_like_the_other_global_views() -> None:
    transform = MultiViewTransform(16, 8, 2, 0)
    views = torch.stack([transform(picture(60, 60), seed)["global_views"] for seed in range(300)]).float()
    mirrored = (views[:, :, 0, :, 0] > views[:, :, 0, :, -1]).all(-1).double().mean(0)
    spread = (views[:, :, 1, -1] - views[:, :, 1, 0]).mean(-1)  # green grows downwards over the crop's height
    assert (mirrored - 0.5).abs().max() < 0.1
    assert (spread.mean(0)[0] - spread.mean(0)[1]).abs() < 8
    assert spread.std(0).min() > 15, "the crops vary in size"


def test_flips_come_at_their_probability() -> None:
    image = picture(60, 60)
    for probability in (0.0, 0.5, 1.0):
        views = MultiViewTransform(8, 8, 200, 200, flip=probability)(image, seed=0)
        flat = torch.cat((views["global_views"], views["local_views"])).float()[:, 0]
        mirrored = (flat[:, :, 0] > flat[:, :, -1]).all(dim=1)
        assert abs(mirrored.double().mean().item() - probability) < 0.08


@pytest.mark.parametrize("scale", [(0.36, 1.0), (0.06, 0.36)])
def test_random_boxes_follow_their_law(scale: tuple[float, float]) -> None:
    draw = random.Random(0)
    height, width = 300, 330
    boxes = np.array([random_box(height, width, scale, draw) for _ in range(4000)])
    top, left, box_height, box_width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    area = box_height * box_width / (height * width)
    ratio = np.log(box_width / box_height)
    assert area.min() >= scale[0] * 0.98 and area.max() <= scale[1] * 1.02
    assert np.abs(ratio).max() <= math.log(4 / 3) + 0.03
    if scale[1] < 0.5:  # every draw fits: both are uniform
        assert abs(area.mean() - sum(scale) / 2) < 0.01 and abs(np.median(area) - sum(scale) / 2) < 0.01
        assert abs(ratio.mean()) < 0.01 and abs(ratio.std() - math.log(16 / 9) / math.sqrt(12)) < 0.01
        slack = (height - box_height) > 0
        assert abs((top / (height - box_height))[slack].mean() - 0.5) < 0.02
        assert abs((left / (width - box_width)).mean() - 0.5) < 0.02


def test_boxes_that_cannot_fit_fall_back_to_the_centre() -> None:
    draw = random.Random(0)
    assert random_box(10, 1000, (0.9, 1.0), draw) == (0, 493, 10, 13)
    assert random_box(1000, 10, (0.9, 1.0), draw) == (493, 0, 13, 10)
    assert random_box(1, 1, (0.06, 0.36), draw) == (0, 0, 1, 1)
    assert centre_square(7, 4) == (1, 0, 4, 4)


def test_tiny_images_give_views() -> None:
    views = MultiViewTransform(16, 8, 2, 2)(Image.new("RGB", (1, 3), (1, 2, 3)), seed=0)
    assert (views["global_views"] == torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]).all()


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (40, 40), (224, 225)])
def test_eval_transform(size: tuple[int, int]) -> None:
    image = picture(*size)
    view = eval_transform(image, 56)
    assert view.shape == (3, 56, 56) and view.dtype == torch.uint8
    height, width = size
    short = 64
    scaled = image.resize((max(short, round(width * short / min(size))), max(short, round(height * short / min(size)))))
    left, top = (scaled.width - 56) // 2, (scaled.height - 56) // 2
    expected = np.asarray(scaled.crop((left, top, left + 56, top + 56))).transpose(2, 0, 1)
    assert np.abs(view.numpy().astype(int) - expected).max() <= 1


def resized_then_cropped(image: Image.Image, side: int) -> np.ndarray:
    """(3, side, side): the whole picture enlarged or reduced by Pillow, and the middle of that."""
    short = round(side * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def test_long_pictures_are_cut_first_to_the_same_pixels() -> None:
    draw = random.Random(0)
    for number in range(60):
        side, short = draw.randrange(1, 60), draw.randrange(1, 30)
        size = (short, int(short * draw.uniform(1, 30)))
        noise = np.random.default_rng(number).integers(0, 256, (*size[:: draw.choice((1, -1))], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        np.testing.assert_array_equal(
            eval_transform(image, side), resized_then_cropped(image, side), err_msg=f"{noise.shape}"
        )


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 70_000), (70_000, 2)])
def test_a_long_picture_costs_what_is_shown_of_it(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.resize(np.arange(251, dtype=np.uint8), (*size, 3)))
    made: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert eval_transform(image, 56).shape == (3, 56, 56) and 0 < max(made) <= 64 * 64


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_views_of_long_pictures(size: tuple[int, int]) -> None:
    pixels = np.resize(np.arange(250, dtype=np.uint8), (*size, 1)).repeat(3, axis=2)
    views = MultiViewTransform(16, 8, 2, 3)(pixels, seed=1)
    for view in (*views["global_views"], *views["local_views"]):  # the largest box within RATIO is one pixel
        assert (view == pixels.reshape(-1, 3)[(20_000 - 1) // 2][0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 16, 0, 1), "at least 1 global and 0 local views are needed but 0 and 1"),
        ((32, 16, 1, 1, (0.5, 0.2)), r"global_scale .* is \(0.5, 0.2\)"),
        ((32, 16, 1, 1, (0.5, 1.0), (0.0, 0.2)), r"local_scale .* is \(0.0, 0.2\)"),
    ],
)
def test_wrong_arguments_raise(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiViewTransform(*arguments)
