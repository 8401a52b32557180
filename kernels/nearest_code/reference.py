"""Plain torch nearest code in fp32 (fp64 where given). N vectors of width E, S codebook entries."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def nearest_code(z_NE: Tensor, codebook_SE: Tensor) -> Tensor:
    """Return (N,) int64; |z - c|^2 = |z|^2 + |c|^2 - 2 z.c, ties take the lowest index."""
    with without_autocast(z_NE):
        z, codebook = at_least_fp32(z_NE), at_least_fp32(codebook_SE)
        dtype = torch.promote_types(z.dtype, codebook.dtype)
        z, codebook = z.to(dtype), codebook.to(dtype)
        distance = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
        return distance.argmin(dim=1)
