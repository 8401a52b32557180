"""Random Fourier features of patch positions, the decoder's position code."""

import math

import torch
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


class FourierPosition(nn.Module):
    """Fixed random Fourier features of the patch centres (arXiv 2006.10739).

    The centre (x, y) in [0, 1] is mapped to 2u - 1, multiplied by a fixed Gaussian matrix (2, dim / 2) and by 2 pi;
    sine and cosine are interleaved per frequency.
    """

    gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"the width of a Fourier position code must be even but is {dim}")
        self.register_buffer("gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the code of a (height, width) grid of patches in row order, (height * width, dim) fp32."""
        height, width = grid
        device = self.gaussian_matrix.device
        matrix = at_least_fp32(self.gaussian_matrix)
        y = (torch.arange(height, device=device, dtype=matrix.dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=matrix.dtype) + 0.5) / width
        centre = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
        with without_autocast(matrix):
            angle = 2 * math.pi * ((2 * centre - 1) @ matrix)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
