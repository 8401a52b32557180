"""Plain torch in fp32 (fp64 where given). B images, C input channels, O output channels, H x W pixels."""

import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def conv3x3(
    x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None = None, residual_BOHW: Tensor | None = None
) -> Tensor:
    """Return (B, O, H, W) fp32."""
    with without_autocast(x_BCHW):
        bias = None if bias_O is None else at_least_fp32(bias_O)
        out = F.conv2d(at_least_fp32(x_BCHW), at_least_fp32(weight_OC33), bias, padding=1)
        return out if residual_BOHW is None else out + at_least_fp32(residual_BOHW)
