"""Plain torch GroupNorm and SiLU in fp32 (fp64 where given). B images, C channels, H x W pixels, G groups."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def group_norm_silu(
    x_BCHW: Tensor,
    groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float = 1e-6,
    stats_BG2: Tensor | None = None,
    residual_BCHW: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return out, and with a residual (out, x + residual), at least fp32; `stats` are computed here in any case."""
    with without_autocast(x_BCHW):
        x = at_least_fp32(x_BCHW)
        if residual_BCHW is not None:
            x = x + at_least_fp32(residual_BCHW)
        grouped = x.unflatten(1, (groups, -1))
        off = grouped - grouped.mean((2, 3, 4), keepdim=True)
        unit = (off * torch.rsqrt(off.square().mean((2, 3, 4), keepdim=True) + eps)).flatten(1, 2)
        out = F.silu(unit * at_least_fp32(weight_C)[:, None, None] + at_least_fp32(bias_C)[:, None, None])
    return out if residual_BCHW is None else (out, x)
