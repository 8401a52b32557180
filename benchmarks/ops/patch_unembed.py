"""torch's transposed convolution, as upstream's decoder calls it."""

import torch.nn.functional as F
from torch import Tensor


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid: tuple[int, int]) -> Tensor:
    return F.conv_transpose2d(x.transpose(1, 2).unflatten(2, grid), weight, bias, stride=patch_size)


PROVIDERS = {"plain": plain}
