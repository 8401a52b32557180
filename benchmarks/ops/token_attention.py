"""torch's attention over the runs of equal length, as upstream calls it for each kind of view."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    groups: Sequence[tuple[int, int, int]],
) -> Tensor:
    outs, row_q, row_k = [], 0, 0
    for (length_q, length_k), run in groupby(groups, key=lambda group: group[1:]):
        count = sum(group[0] for group in run)
        end_q, end_k = row_q + count * length_q, row_k + count * length_k
        heads = [x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q[row_q:end_q], k[row_k:end_k], v[row_k:end_k])]
        outs.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
        row_q, row_k = end_q, end_k
    return torch.cat(outs)


PROVIDERS = {"plain": plain}
