"""Plain torch linear in fp32 (fp64 where given). I input width, O output width."""

from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x W^T + b, (..., O) fp32."""
    out = at_least_fp32(x) @ at_least_fp32(weight_OI).T
    return out if bias_O is None else out + at_least_fp32(bias_O)
