"""Upstream's localization, product with the tokens, position code and peak, each its own step."""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    temperature: float = 0.06,
    return_localization: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    query, key = F.normalize(query, dim=-1, eps=1e-7), F.normalize(key, dim=-1, eps=1e-7)
    localization = torch.softmax((query @ key.transpose(1, 2)).float() / temperature, dim=-1)
    out = localization.to(value.dtype) @ value + bias
    return out, localization if return_localization else None, localization.detach().amax(dim=1)


PROVIDERS = {"plain": plain}
ARGUMENTS = {"return_localization": False}  # as in a training step
