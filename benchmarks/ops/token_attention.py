"""torch's attention over the runs of equal length, as upstream calls it for each kind of view.

`plain` leaves the choice of SDPA's backend to torch; on CUDA each of them runs as a provider of its own too, beside the
packed attention of torch, flash-attn and xformers, where these are installed.
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


def sdpa(backend: SDPBackend) -> Provider:
    """`plain` by one of SDPA's backends."""

    def run(q: Tensor, **others: Any) -> Tensor:
        with sdpa_kernel(backend):
            return plain(q, **others)

    return _on_cuda(run)


def nested(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, groups: Any) -> Tensor:
    pairs = ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    sides = [torch.nested.nested_tensor_from_jagged(x, starts.long()).transpose(1, 2) for x, starts in pairs]
    return F.scaled_dot_product_attention(*sides).transpose(1, 2).values()


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, groups: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = [max(group[i] for group in groups) for i in (1, 2)]
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest)  # type: ignore[return-value]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, groups: Any) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = [max(group[i] for group in groups) for i in (1, 2)]
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest)


def xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, groups: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [[length for group in groups for length in [group[i]] * group[0]] for i in (1, 2)]
    mask = BlockDiagonalMask.from_seqlens(*lengths)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def _on_cuda(attention: Provider) -> Provider:
    """No choice on a CPU. On CUDA a library may be missing, or not take the dtype or the head's width."""

    def run(q: Tensor, **others: Any) -> Tensor:
        if q.device.type != "cuda":
            raise DoesNotRun("compared on CUDA only")
        try:
            return attention(q=q, **others)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            raise DoesNotRun((str(error).splitlines() or [type(error).__name__])[0]) from None

    return run


PROVIDERS = {
    "plain": plain,
    "torch.sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch.sdpa_efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "torch.sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "torch.sdpa_math": sdpa(SDPBackend.MATH),
    "torch.nested": _on_cuda(nested),
    "torch.varlen_attn": _on_cuda(varlen),
    "flash_attn": _on_cuda(flash_attn),
    "xformers": _on_cuda(xformers),
}
