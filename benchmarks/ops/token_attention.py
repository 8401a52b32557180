"""torch's attention over the runs of equal length, as upstream calls it for each kind of view.

`plain` leaves the choice of SDPA's backend to torch; on CUDA each of them runs as a provider of its own too.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators import DoesNotRun, Provider


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


def by(backend: SDPBackend) -> Provider:
    """`plain` by one of SDPA's backends, which may not take the dtype or the head's width."""

    def run(q: Tensor, **others: Any) -> Tensor:
        if q.device.type != "cuda":
            raise DoesNotRun("compared on CUDA only")
        try:
            with sdpa_kernel(backend):
                return plain(q, **others)
        except RuntimeError as error:
            raise DoesNotRun(error) from None

    return run


PROVIDERS = {
    "plain": plain,
    "torch.sdpa_flash": by(SDPBackend.FLASH_ATTENTION),
    "torch.sdpa_efficient": by(SDPBackend.EFFICIENT_ATTENTION),
    "torch.sdpa_cudnn": by(SDPBackend.CUDNN_ATTENTION),
    "torch.sdpa_math": by(SDPBackend.MATH),
}
