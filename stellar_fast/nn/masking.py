"""Which patches of a masked view stay visible: uniform noise, focused on a Gaussian bump or on a block.

N views, P = height * width patches.
"""

import math
from typing import Any

import torch
from torch import Tensor

FOCAL_MODES = ("gaussian", "block", None)


def gaussian_focus(noise: Tensor, grid: tuple[int, int], centre: Tensor, sigma: Tensor) -> Tensor:
    """Subtract ``exp(-d^2 / 2 sigma^2)`` around a patch from the noise.

    Args:
        noise: (N, P) fp32.
        grid: patches in height and width.
        centre: (N, 2) int64, (row, column) of the bump.
        sigma: (N,) fp32, in patches.

    Returns:
        (N, P) fp32.
    """
    row, column = patch_coordinates(grid, noise.device)
    squared_distance = (row - centre[:, :1]) ** 2 + (column - centre[:, 1:]) ** 2
    return noise - torch.exp(-squared_distance / (2 * sigma[:, None] ** 2))


def block_focus(noise: Tensor, grid: tuple[int, int], corner: Tensor, side: int) -> Tensor:
    """Set the noise inside a square to zero.

    Args:
        noise: (N, P) fp32.
        grid: patches in height and width.
        corner: (N, 2) int64, (row, column) of the square's first patch.
        side: of the square, in patches.

    Returns:
        (N, P) fp32.
    """
    row, column = patch_coordinates(grid, noise.device)
    top, left = corner[:, :1], corner[:, 1:]
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return noise.masked_fill(inside, 0.0)


def patch_coordinates(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in row order, each (P,) int64."""
    index = torch.arange(grid[0] * grid[1], device=device)
    return index // grid[1], index % grid[1]


def random_keep_indices(
    num_views: int,
    grid: tuple[int, int],
    masking_ratio: float,
    *,
    focal_mode: str | None = "gaussian",
    focal_probability: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the visible patches of masked views: those with the smallest noise.

    Args:
        num_views: N.
        grid: patches in height and width.
        masking_ratio: share of patches that are dropped, in [0, 1); ``int(P * (1 - masking_ratio))`` stay.
        focal_mode: "gaussian" (a bump of sigma U(0.1, 0.5) sides at a random patch), "block" (a tight square of side
            ``int(sqrt(kept))``) or None.
        focal_probability: share of the views that are focused; None takes 0.5 for "gaussian" and 1 for "block".
        generator: source of randomness on `device`.
        device: of the result.

    Returns:
        (N, kept) int64 patch indices, ascending in each row.

    Raises:
        ValueError: an unknown focal mode, a ratio outside [0, 1), or one that keeps no patch.

    Source: STELLAR (arXiv 2602.01905), masked views.
    """
    height, width = grid
    num_patches = height * width
    if focal_mode not in FOCAL_MODES:
        raise ValueError(f"focal_mode must be one of {FOCAL_MODES} but is {focal_mode!r}")
    if not 0 <= masking_ratio < 1:
        raise ValueError(f"masking_ratio must be in [0, 1) but is {masking_ratio}")
    kept = int(num_patches * (1 - masking_ratio))
    if kept < 1:
        raise ValueError(f"masking_ratio {masking_ratio} keeps none of {num_patches} patches")

    # a trace whose sizes may change takes no generator, not even None
    source: dict[str, Any] = {} if generator is None else {"generator": generator}

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, **source, device=device)

    def randint(high: int) -> Tensor:  # uniform in 0..high-1; the minimum guards the rounding of rand() to 1
        return (rand(num_views) * high).long().clamp_max(high - 1)

    noise = rand(num_views, num_patches)
    if focal_mode == "gaussian":
        centre = torch.stack((randint(height), randint(width)), dim=1)
        # the grid's side is that of a square of as many patches, which is the side itself on square grids
        sigma = (0.1 + 0.4 * rand(num_views)) * math.sqrt(num_patches)
        focused = gaussian_focus(noise, grid, centre, sigma)
    elif focal_mode == "block":
        side = min(math.isqrt(kept), height, width)
        corner = torch.stack((randint(height - side + 1), randint(width - side + 1)), dim=1)
        focused = block_focus(noise, grid, corner, side)
    if focal_mode is not None:
        probability = (
            focal_probability if focal_probability is not None else {"gaussian": 0.5, "block": 1.0}[focal_mode]
        )
        noise = torch.where(rand(num_views, 1) < probability, focused, noise)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values
