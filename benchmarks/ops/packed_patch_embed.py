"""Upstream's embedding: every view through the convolution in full, then the kept patches, then one packed tensor."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    mean: Tensor,
    std: Tensor,
    keep_indices: Sequence[Tensor | None],
) -> Tensor:
    packed = []
    for view, position, keep in zip(images, positions, keep_indices, strict=True):
        pixels = (view - mean[:, None, None]) / std[:, None, None]
        patches = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + position[1:]
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        cls, sparse = (cls_token + position[0]).expand(len(view), 1, -1), sparse_tokens.expand(len(view), -1, -1)
        packed.append(torch.cat([cls, patches, sparse], dim=1).flatten(0, 1))
    return torch.cat(packed)


PROVIDERS = {"plain": plain}
