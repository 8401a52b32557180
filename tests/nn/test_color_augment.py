"""ColorAugment against formulas for single images and pixels."""

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from stellar_fast.nn import color_augment
from stellar_fast.nn.color_augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColorAugment, gaussian_blur, shift_hue

OFF = {"jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": 0.0}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(64, 3, 11, 14, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey(image: np.ndarray) -> np.ndarray:
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def jitter_one(image: np.ndarray, operation: int, factor: float) -> np.ndarray:
    """One operation of the standard colour jitter on one (3, H, W) image."""
    if operation == BRIGHTNESS:
        changed = image * factor
    elif operation == CONTRAST:
        changed = factor * image + (1 - factor) * grey(image).mean()
    elif operation == SATURATION:
        changed = factor * image + (1 - factor) * grey(image)
    else:
        changed = np.empty_like(image)
        for y, x in np.ndindex(image.shape[1:]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
            changed[:, y, x] = colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value)
    return changed.clip(0, 1)


def test_hue_is_colorsys(images: Tensor) -> None:
    images[:, :, 0, 0] = 0.3  # grey
    images[:, :, 0, 1] = torch.tensor([1.0, 0.0, 0.0])
    images[:, :, 0, 2] = torch.tensor([0.5, 0.5, 0.2])  # two largest channels
    turns = torch.linspace(-0.6, 0.6, len(images))
    for changed, image, turn in zip(shift_hue(images, turns), images, turns, strict=True):
        expected = jitter_one(image.double().numpy(), HUE, turn.item())
        np.testing.assert_allclose(changed.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(11, 14), (5, 40)])
def test_blur_is_scipys(shape: tuple[int, int]) -> None:
    images = torch.rand(6, 3, *shape, generator=seeded())
    sigmas = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
    for blurred, image, sigma in zip(gaussian_blur(images, sigmas, 9), images, sigmas, strict=True):
        deviations = (0, sigma.item(), sigma.item())
        expected = ndimage.gaussian_filter(image.double().numpy(), deviations, radius=(0, 4, 4), mode="mirror")
        np.testing.assert_allclose(blurred.numpy(), expected, atol=2e-6)


def test_jitter_applies_the_four_operations_in_each_views_order(images: Tensor) -> None:
    augment = ColorAugment(**OFF)
    generator = seeded()
    order = torch.stack([torch.randperm(4, generator=generator) for _ in images])
    factors = torch.rand(len(images), 4, generator=generator) * torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors += torch.tensor([0.6, 0.6, 0.8, -0.1])
    selected = torch.rand(len(images), generator=generator) < 0.7
    changed = augment._jitter(images.clone(), selected, factors, order)
    assert selected.any() and not selected.all() and len(order.unique(dim=0)) > 15
    for n, image in enumerate(images):
        expected = image.double().numpy()
        for operation in order[n].tolist() if selected[n] else []:
            expected = jitter_one(expected, operation, factors[n, operation].item())
        np.testing.assert_allclose(changed[n].numpy(), expected, atol=5e-6)


def test_grey_alone(images: Tensor) -> None:
    changed = ColorAugment(**{**OFF, "grey_probability": 1.0})(images)
    expected = np.stack([np.broadcast_to(grey(image), image.shape) for image in images.numpy()])
    np.testing.assert_allclose(changed.numpy(), expected, atol=1e-6)


def test_blur_draws_one_sigma_a_view() -> None:
    images = torch.zeros(500, 3, 9, 9)
    images[:, :, 4, 4] = 1
    changed = ColorAugment(**{**OFF, "blur_probability": 1.0})(images, seeded())[:, 0]
    # centre and neighbour of the blurred point give the standard deviation back
    sigma = (0.5 / (changed[:, 4, 4] / changed[:, 4, 5]).log()).sqrt()
    wide = sigma[sigma > 0.25]  # below, the neighbour is lost in rounding
    assert wide.min() > 0.25 and wide.max() < 2.0001 and wide.max() > 1.9
    assert math.isclose(wide.mean().item(), (0.25 + 2.0) / 2, abs_tol=0.1)
    assert len(wide.unique()) > 400


def test_each_part_comes_at_its_probability() -> None:
    images = torch.rand(4000, 3, 5, 5, generator=seeded(1))
    for part, probability in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)):
        augment = ColorAugment(**{**OFF, f"{part}_probability": probability})
        changed = augment(images, seeded(2))
        share = (changed != images).flatten(1).any(1).double().mean().item()
        # a blur of sigma < 0.2 changes nothing in fp32
        expected = probability * (1 - 0.1 / 1.9) if part == "blur" else probability
        assert abs(share - expected) < 0.03, part


def test_nothing_selected_returns_the_images(images: Tensor) -> None:
    changed = ColorAugment(**OFF)(images)
    assert torch.equal(changed, images) and changed.data_ptr() != images.data_ptr()


def test_output_stays_in_range_and_input_unchanged(images: Tensor) -> None:
    before = images.clone()
    changed = ColorAugment(brightness=0.9, contrast=0.9, saturation=0.9)(images, seeded())
    assert torch.equal(images, before)
    assert changed.min() >= 0 and changed.max() <= 1 and changed.isfinite().all()


def test_the_generator_decides_alone(images: Tensor) -> None:
    augment = ColorAugment()
    torch.manual_seed(0)
    first = augment(images, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(augment(images, seeded(3)), first)
    assert not torch.equal(augment(images, seeded(4)), first)
    assert not torch.equal(first[0], augment(images[:1].expand_as(images), seeded(3))[1])  # views differ in their draws


def test_the_path_without_host_syncs_agrees(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ColorAugment()(images, seeded())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(ColorAugment()(images, seeded()), expected, atol=1e-6, rtol=0)


def test_under_autocast_and_in_bf16(images: Tensor) -> None:
    expected = ColorAugment()(images, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ColorAugment()(images, seeded()), expected)
    low = ColorAugment()(images.bfloat16(), seeded())
    assert low.dtype == torch.bfloat16 and (low.float() - expected).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 9, 9), r"\(2, 1, 9, 9\)"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 3, 4, 9), r"9 taps does not fit images of \(4, 9\)"),
    ],
)
def test_wrong_images_raise(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColorAugment()(images)


def test_an_even_blur_raises() -> None:
    with pytest.raises(ValueError, match="odd and positive but is 4"):
        color_augment.ColorAugment(blur_size=4)
