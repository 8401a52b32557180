"""Plain torch nearest code in fp32. N vectors of width E, S codebook entries."""

import torch
from torch import Tensor


def nearest_code(z_NE: Tensor, codebook_SE: Tensor) -> Tensor:
    """Return (N,) int64; |z - c|^2 = |z|^2 + |c|^2 - 2 z.c, ties take the lowest index."""
    with torch.autocast(z_NE.device.type, enabled=False):
        z, codebook = z_NE.float(), codebook_SE.float()
        distance = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
        return distance.argmin(dim=1)
