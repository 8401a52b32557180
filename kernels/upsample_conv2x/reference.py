"""Plain torch in fp32 (fp64 where given). B images, C input channels, O output channels, H x W pixels of the input."""

import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def upsample_conv2x(x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return (B, O, 2H, 2W) fp32."""
    with without_autocast(x_BCHW):
        x, weight = at_least_fp32(x_BCHW), at_least_fp32(weight_OC33)
        bias = None if bias_O is None else at_least_fp32(bias_O)
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
