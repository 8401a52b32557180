"""Plain torch linear and exact GELU in fp32 (fp64 where given). I input width, O output width."""

import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, gelu: str | None = None) -> Tensor:
    """Return f(x) W^T + b or f(x W^T + b), (..., O) fp32."""
    x = at_least_fp32(x)
    out = (F.gelu(x) if gelu == "input" else x) @ at_least_fp32(weight_OI).T
    out = out if bias_O is None else out + at_least_fp32(bias_O)
    return F.gelu(out) if gelu == "output" else out
