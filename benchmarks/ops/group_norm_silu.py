"""torch's GroupNorm on channels-last images and its SiLU; it has no use for statistics that came along."""

import torch.nn.functional as F
from torch import Tensor


def plain(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    y = x if residual is None else x + residual
    out = F.silu(F.group_norm(y, groups, weight, bias, eps))
    return out if residual is None else (out, y)


PROVIDERS = {"plain": plain}
