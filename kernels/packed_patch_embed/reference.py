"""Plain torch packed_patch_embed in fp32 (fp64 where given): a convolution over all patches, then the kept ones.

N images of a view, P patches of its grid, kept of them stay, D width, K sparse tokens, T rows of all sequences.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def packed_patch_embed(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    keep_indices: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return (T, D) fp32; arguments as the operator's."""
    weight, bias, mean, std = map(at_least_fp32, (weight, bias, mean, std))
    packed = []
    with without_autocast(weight):
        for view, position, keep in zip(images, positions, keep_indices or [None] * len(images), strict=True):
            pixels = view.to(weight.dtype) / (255 if view.dtype == torch.uint8 else 1)
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
            patches = F.conv2d(pixels, weight, bias, stride=weight.shape[-2:]).flatten(2).mT + position[1:]
            if keep is not None:
                patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
            cls, sparse = ((x).expand(len(view), -1, -1) for x in (cls_token + position[:1], sparse_tokens))
            packed.append(torch.cat((cls, patches, sparse), dim=1).flatten(0, 1))
        return torch.cat(packed)
