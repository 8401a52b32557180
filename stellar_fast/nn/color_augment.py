"""Colour jitter, grey and blur of a batch of views, on their device.

N views, 3 colours, H x W pixels. Every view draws its own numbers; the upstream implementation draws once for a whole
batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import without_autocast
from stellar_fast.ops.checks import has_values

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; a number stays on the host: a tensor of it would be waited for on a GPU
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class ColorAugment(nn.Module):
    """Random colour jitter, grey and Gaussian blur, drawn per view and clamped to [0, 1].

    Args:
        brightness, contrast, saturation: factors are drawn from [1 - value, 1 + value].
        hue: shift drawn from [-value, value], in turns of the colour circle.
        jitter_probability: of the four above, which come in a random order and clamp after each.
        grey_probability: of replacing a view by its luma.
        blur_probability: of a Gaussian blur with reflected borders.
        blur_size: taps of the blur along each axis, odd.
        blur_sigma: range of its standard deviation in pixels.
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        grey_probability: float = 0.2,
        blur_probability: float = 0.5,
        blur_size: int = 9,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
    ):
        super().__init__()
        if blur_size < 1 or blur_size % 2 == 0:
            raise ValueError(f"blur_size must be odd and positive but is {blur_size}")
        self.spread = (brightness, contrast, saturation, hue)
        self.jitter_probability = jitter_probability
        self.grey_probability = grey_probability
        self.blur_probability = blur_probability
        self.blur_size = blur_size
        self.blur_sigma = blur_sigma

    @torch.no_grad()
    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment views.

        Args:
            images: (N, 3, H, W) floating in [0, 1]; not changed.
            generator: source of the draws, one row of numbers a view; torch's global one by default.

        Returns:
            Tensor of the same shape and dtype in [0, 1], without gradient.

        Raises:
            ValueError: not a floating batch of RGB images, or one smaller than the blur's half width.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating of shape (N, 3, H, W) but are {images.dtype} of shape {tuple(images.shape)}"
            )
        if min(images.shape[2:]) <= self.blur_size // 2:
            raise ValueError(f"a blur of {self.blur_size} taps does not fit images of {tuple(images.shape[2:])} pixels")

        # a trace whose sizes may change takes no generator, not even None
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        device = images.device if generator is None else generator.device
        draws = torch.rand(len(images), 12, **source, device=device).to(images.device)
        jitter, grey, blur = (
            draws[:, i] < p
            for i, p in enumerate((self.jitter_probability, self.grey_probability, self.blur_probability))
        )
        draws = draws.float()  # whatever torch's default dtype is
        low, high = self.blur_sigma
        sigmas = low + (high - low) * draws[:, 3]
        centred = 2 * draws[:, 4:8] - 1
        centres = (1, 1, 1, 0)  # the hue is shifted, the others are scaled
        factors = torch.stack(
            [c + s * centred[:, i] for i, (c, s) in enumerate(zip(centres, self.spread, strict=True))], dim=1
        )
        order = draws[:, 8:12].argsort(dim=1)  # order[n, i] is the i-th operation of view n

        with without_autocast(images):
            views = images.to(torch.float32, copy=True)
            views = self._jitter(views, jitter, factors, order)
            views = _where(grey, views, lambda x: _luma(x).expand_as(x))
            views = _where(blur, views, lambda x, sigma: gaussian_blur(x, sigma, self.blur_size), sigmas)
            return views.clamp_(0, 1).to(images.dtype)

    def _jitter(self, views: Tensor, selected: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        # The hue is the dear one: it is computed once, between the operations that precede it and those that follow.
        hue_position = (order == HUE).int().argmax(dim=1)
        for position in range(3):
            kind = order[:, position]
            factor = factors.gather(1, kind[:, None])[:, 0]
            views = _where(selected & (hue_position > position), views, _blend, kind, factor)
        views = _where(selected, views, shift_hue, factors[:, HUE])
        for position in range(1, 4):
            kind = order[:, position]
            factor = factors.gather(1, kind[:, None])[:, 0]
            views = _where(selected & (hue_position < position), views, _blend, kind, factor)
        return views


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) RGB images in [0, 1] by (N,) turns; value and saturation of HSV stay."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    scale = 1 / chroma.clamp_min(1e-8)  # grey pixels have no hue: their chroma of 0 below makes any hue right
    sector = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    sector = torch.where(value == red, (green - blue) * scale, sector)
    sector = sector + 6 * turns[:, None, None]
    # HSV to RGB: a channel falls short of the value by the chroma times a trapezoid over its six sectors.
    phase = (sector[:, None] + torch.arange(5, 0, -2, device=images.device)[:, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(phase, 4 - phase).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigmas: Tensor, size: int) -> Tensor:
    """Blur (N, C, H, W) images by (N,) standard deviations in pixels, `size` taps an axis, borders reflected."""
    height, width = images.shape[2:]
    distance = torch.arange(-(size // 2), size // 2 + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (distance / sigmas[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    # One matrix an image and axis holds weights and reflection both: two batched products, no loop over images.
    down = (weights @ _taps(height, size, images)).view(-1, 1, height, height)
    across = (weights @ _taps(width, size, images)).view(-1, 1, width, width)
    return down @ images @ across.transpose(2, 3)


def _taps(length: int, size: int, like: Tensor) -> Tensor:
    """(size, length * length): row k holds, as a flat matrix, which pixel tap k of each pixel reads."""
    half = size // 2
    index = torch.arange(length, device=like.device) + torch.arange(-half, half + 1, device=like.device)[:, None]
    index = (length - 1) - ((length - 1) - index.abs()).abs()
    return (index[..., None] == torch.arange(length, device=like.device)).to(like.dtype).flatten(1)


def _blend(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast and saturation: move away from black, from the mean luma or from the luma."""
    luma = _luma(images)
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    origin = torch.where(kind == CONTRAST, luma.mean((2, 3), keepdim=True), luma)
    origin = origin * (kind != BRIGHTNESS)
    return (factor * images + (1 - factor) * origin).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _where(selected: Tensor, images: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Change the selected images; `parameters` have one row an image. May write into `images`."""
    if images.is_cpu and has_values(images):
        index = selected.nonzero()[:, 0]
        return images.index_copy_(0, index, change(images[index], *(p[index] for p in parameters)))
    # Elsewhere the number of selected images would have to be waited for: all are changed, the selected ones are taken.
    return torch.where(selected[:, None, None, None], change(images, *parameters), images)
