"""Plain torch sum and LayerNorm in fp32 (fp64 where given). D width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (residual + x, LayerNorm of the sum), both at least fp32; `dtype` is of no effect."""
    total = at_least_fp32(x) if residual is None else at_least_fp32(residual) + at_least_fp32(x)
    return total, F.layer_norm(total, weight_D.shape, at_least_fp32(weight_D), at_least_fp32(bias_D), eps)
