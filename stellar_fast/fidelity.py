"""How near a reconstruction is to its image: PSNR, SSIM, where it errs, and what each token adds.

Images are (H, W, 3) uint8 RGB arrays. K sparse tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from stellar_fast.visualize import Pixels, Tile, grid_figure, psnr, token_colours, token_rows

_WINDOW, _SIGMA = 11, 1.5  # of the SSIM, with its constants below: the values that its authors give
_K1, _K2 = 0.01, 0.03
_FULL_ERROR = 0.25  # share of the range from which on the error map is white


@dataclass(frozen=True)
class Fidelity:
    """One reconstruction in numbers.

    Attributes:
        psnr_db: peak signal-to-noise ratio; infinite where nothing differs.
        ssim: structural similarity; 1 where nothing differs.
        token_psnr_db: PSNR without token 0, 1, ...; empty where no token was left out.
    """

    psnr_db: float
    ssim: float
    token_psnr_db: tuple[float, ...] = ()


def ssim(image: Pixels, other: Pixels) -> float:
    """Mean structural similarity of two images of one size, over channels and all whole windows.

    With Gaussian windows of 11 x 11 pixels, sigma 1.5, K1 0.01, K2 0.03 and variances divided by N; data range 1.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4), 2004.

    Raises:
        ValueError: images of different shapes, or smaller than a window.
    """
    if image.shape != other.shape:
        raise ValueError(f"images of different shapes have no SSIM: {image.shape} and {other.shape}")
    if min(image.shape[:2]) < _WINDOW:
        height, width = image.shape[:2]
        raise ValueError(f"an image of {height}x{width} has no SSIM: its windows are {_WINDOW}x{_WINDOW}")
    x, y = (torch.from_numpy(a.astype(np.float64) / 255).permute(2, 0, 1) for a in (image, other))
    offset = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    window /= window.sum()
    maps = torch.stack((x, y, x * x, y * y, x * y)).flatten(0, 1)[:, None]
    maps = torch.nn.functional.conv2d(maps, window.view(1, 1, -1, 1))
    maps = torch.nn.functional.conv2d(maps, window.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = maps.unflatten(0, (5, -1))
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (luminance * structure).mean().item()


def fidelity(image: Pixels, reconstruction: Pixels, without: Sequence[Pixels] = ()) -> Fidelity:
    """Measure a reconstruction, and those `without` token 0, 1, ..."""
    return Fidelity(
        psnr(image, reconstruction), ssim(image, reconstruction), tuple(psnr(image, other) for other in without)
    )


def error_map(image: Pixels, reconstruction: Pixels) -> Pixels:
    """Where a reconstruction errs, from black over red and yellow to white: the mean of the channels' absolute errors.

    The scale is the same for all images: white is a quarter of the range, or more.
    """
    error = np.abs(image.astype(np.float32) - reconstruction).mean(axis=2) / (255 * _FULL_ERROR)
    heat = 3 * error[..., None] - np.arange(3, dtype=np.float32)
    return (255 * heat.clip(0, 1)).round().astype(np.uint8)


def fidelity_panel(
    image: Pixels,
    reconstruction: Pixels,
    without: Sequence[Pixels],
    found: Fidelity,
    *,
    title: str = "",
    width: int = 1280,
) -> Image.Image:
    """Image, reconstruction, error map, and the reconstruction without each token, the one that is missed most first.

    Args:
        image: (H, W, 3) uint8.
        reconstruction: (H, W, 3) uint8.
        without: K of them, without token 0, 1, ...
        found: `fidelity` of these pictures.
        title: first line, such as the file's name.
        width: of the figure in pixels.
    """
    if len(without) != len(found.token_psnr_db):
        raise ValueError(f"there are {len(without)} pictures without a token but {len(found.token_psnr_db)} PSNRs")
    first: list[Tile] = [
        (image, "original"),
        (reconstruction, f"reconstruction · {found.psnr_db:.2f} dB · SSIM {found.ssim:.3f}"),
        (error_map(image, reconstruction), f"error · white is {100 * _FULL_ERROR:.0f} % of the range or more"),
    ]
    change_db = np.array(found.token_psnr_db) - found.psnr_db
    order = np.argsort(change_db, kind="stable")
    tiles = [(without[k], f"token {k} · {change_db[k]:+.2f} dB") for k in order]
    colours = token_colours(len(without))
    swatches = {caption: tuple(colours[k].tolist()) for k, (_, caption) in zip(order, tiles, strict=True)}
    title += " · below, what is left without one token"
    return grid_figure([first, *token_rows(tiles, 8)], width, title.removeprefix(" · "), swatches)
