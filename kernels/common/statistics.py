"""What a GroupNorm that follows reads."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


@torch.no_grad()
def statistics(x_BCHW: Tensor, groups: int) -> Tensor:
    """Return (B, groups, 2) fp32: mean and biased variance over the channels of a group and all pixels."""
    x = at_least_fp32(x_BCHW.detach())
    if not x.numel():  # of no values at all torch warns
        return x.new_full((x.shape[0], groups, 2), torch.nan)
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)).flatten(2), dim=2, correction=0)
    return torch.stack((mean, variance), dim=2)
