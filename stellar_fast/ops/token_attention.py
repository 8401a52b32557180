"""token_attention: attention within short sequences packed one after another.

T rows of all sequences, H heads, d channels a head, N sequences.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.precision import without_autocast
from stellar_fast.kernels.token_attention import reference
from stellar_fast.ops.checks import check_floating, check_shapes, in_forward_mode, values_are_checked
from stellar_fast.tune.lookup import knobs, threads

MAX_HEAD_DIM = 128  # of the kernels; beyond it torch computes
Groups = Sequence[tuple[int, int, int]]  # (sequences, rows of q, rows of k) in packed order
_OPERATOR = "token_attention"
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    sizes: Sequence[int],
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Return out (Tq, H, d) and lse (H, Tq) fp32. `sizes` are the groups' numbers in a row."""
    backend.ran(_OPERATOR, name)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if name == "triton":
        from stellar_fast.kernels.token_attention import kernel

        for part, chosen in _launches(q, starts_q, starts_k, sizes):
            kernel.launch_token_attention_fwd(q, k, v, *part, scale, chosen, into=(out, lse))
        return out, lse
    native.module().token_attention_forward(
        *_native_shape(q, k, starts_q, starts_k, scale),
        *map(_heads, (q, k, v, out)),
        lse.data_ptr(),
        threads(_OPERATOR, _sizes(q, k, starts_q), q.dtype).forward,
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    sizes: Sequence[int],
    scale: float,
    name: str,
    into: Sequence[Tensor],
) -> None:
    """Write the gradients of q, k and v into `into`, which may be strided."""
    backend.ran(_OPERATOR, name)
    grad_out = _rows_of_heads(grad_out)
    if name == "triton":
        from stellar_fast.kernels.token_attention import kernel

        for part, chosen in _launches(q, starts_q, starts_k, sizes):
            kernel.launch_token_attention_bwd(grad_out, q, k, v, out, lse, *part, scale, chosen, out_grads=into)
        return
    native.module().token_attention_backward(
        *_native_shape(q, k, starts_q, starts_k, scale),
        *map(_heads, (grad_out, q, k, v, *into)),
        threads(_OPERATOR, _sizes(q, k, starts_q), q.dtype).backward,
    )


def _launches(
    q: Tensor, starts_q: Tensor, starts_k: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[tuple[Tensor, Tensor, int, int], Any]]:
    """The parts of a batch that want launches of their own: row ranges, longest sequences, and launch knobs."""
    from stellar_fast.kernels.token_attention import config

    groups = list(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    choose = functools.partial(knobs, _OPERATOR, config)
    for first, end, longest_q, longest_k, chosen in config.runs(groups, {"d": q.shape[2]}, q.dtype, q.device, choose):
        part = slice(first, end + 1)
        yield (starts_q[part], starts_k[part], longest_q, longest_k), chosen


def _native_shape(q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float) -> tuple:
    (rows_q, heads, head_dim), is_bfloat16 = q.shape, q.dtype == torch.bfloat16
    starts = starts_q.data_ptr(), starts_k.data_ptr(), starts_q.shape[0] - 1
    return *starts, heads, head_dim, scale, is_bfloat16, rows_q, k.shape[0]


def _sizes(q: Tensor, k: Tensor, starts: Tensor) -> dict[str, int]:
    """Sequences, rows of q and of k."""
    return {"N": len(starts) - 1, "Q": len(q), "T": len(k), "H": q.shape[1], "d": q.shape[2]}


def _heads(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _rows_of_heads(x: Tensor) -> Tensor:
    """With channels next to each other, which the kernels need; rows and heads may be strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("stellar_fast::token_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, sizes: list[int], scale: float, name: str
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, starts_q, starts_k, sizes, scale, name)


@_attend.register_fake
def _(q, k, v, starts_q, starts_k, sizes, scale, name):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("stellar_fast::token_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    sizes: list[int],
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _backward(grad_out, q, k, v, out, lse, starts_q, starts_k, sizes, scale, name, grads)
    return grads


@_attend_backward.register_fake
def _(grad_out, q, k, v, out, lse, starts_q, starts_k, sizes, scale, name):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, starts_q, starts_k, ctx.sizes, ctx.scale, ctx.name = inputs
    ctx.save_for_backward(q, k, v, *output, starts_q, starts_k)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Tensor | None, _):
    if grad_out is None:
        return (None,) * 8
    grads = _attend_backward(grad_out, *ctx.saved_tensors, ctx.sizes, ctx.scale, ctx.name)
    return *grads, *(None,) * 5


_attend.register_autograd(_differentiate, setup_context=_save)


# q, k and v side by side in one tensor, as one projection writes them: the gradient is one tensor too, without a copy.
@torch.library.custom_op("stellar_fast::token_self_attention", mutates_args=())
def _self_attend(qkv: Tensor, starts: Tensor, sizes: list[int], scale: float, name: str) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return _forward(q, k, v, starts, starts, sizes, scale, name)


@_self_attend.register_fake
def _(qkv, starts, sizes, scale, name):
    T, _, H, d = qkv.shape
    return qkv.new_empty(T, H, d), qkv.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("stellar_fast::token_self_attention_backward", mutates_args=())
def _self_attend_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor, sizes: list[int], scale: float, name: str
) -> Tensor:
    grad = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(1)
    _backward(grad_out, q, k, v, out, lse, starts, starts, sizes, scale, name, grad.unbind(1))
    return grad


@_self_attend_backward.register_fake
def _(grad_out, qkv, out, lse, starts, sizes, scale, name):
    return qkv.new_empty(qkv.shape)


def _save_self(ctx, inputs, output) -> None:
    qkv, starts, ctx.sizes, ctx.scale, ctx.name = inputs
    ctx.save_for_backward(qkv, *output, starts)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_self(ctx, grad_out: Tensor | None, _):
    grad = None
    if grad_out is not None:
        grad = _self_attend_backward(grad_out, *ctx.saved_tensors, ctx.sizes, ctx.scale, ctx.name)
    return grad, None, None, None, None


_self_attend.register_autograd(_differentiate_self, setup_context=_save_self)


def cu_seqlens(groups: Groups, column: int, device: torch.device) -> Tensor:
    """Row ranges (N + 1,) int32 of column 1 (lengths of q) or 2 (of k) of the groups. The host waits for nothing."""
    at, pieces = 0, [torch.zeros(1, dtype=torch.int32, device=device)]
    for group in groups:
        count, length = group[0], group[column]
        pieces.append(torch.arange(1, count + 1, dtype=torch.int32, device=device) * length + at)
        at += count * length
    return torch.cat(pieces)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None = None,
    *,
    groups: Groups | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale q k^T) v`` within each sequence of a packed batch.

    Args:
        q: (Tq, H, d) floating. The rows of q may be a subset of a sequence's tokens.
        k: (Tk, H, d) of q's dtype.
        v: (Tk, H, d) of q's dtype.
        cu_seqlens_q: (N + 1,) int32 on q's device: sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
            May be None with `groups`.
        cu_seqlens_k: the same for k and v; None means cu_seqlens_q.
        groups: (sequences, length of q, length of k) of runs of equal lengths, in packed order, on the host: without
            them the lengths are read from the device, which waits for it. Given both, they have to agree: checked on a
            CPU, on CUDA under STELLAR_FAST_CHECK=1.
        scale: None takes 1 / sqrt(d).

    Returns:
        (Tq, H, d) of q's dtype, accumulated in fp32; zeros for a sequence without keys. Backends: `triton`, `cpu` (fp32
        and bf16), both for d <= 128; `torch` (SDPA on CUDA, two batched products on a CPU, by groups of equal lengths);
        `flash_attn` and `xformers` when asked for (written from their documentation, not yet run on a device);
        `reference` (fp32, result in q's dtype). `triton` and `cpu` have no second derivative (a double backward
        raises); under ``use_backend("reference")`` or ``use_backend(token_attention="torch")`` there is one.

    Raises:
        ValueError: shapes or dtypes that do not fit together, lengths that do not add up to the rows.
    """
    check_shapes(q=(q, "QHd"), k=(k, "THd"), v=(v, "THd"))
    check_floating(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype but have {q.dtype}, {k.dtype} and {v.dtype}")
    groups, starts_q, starts_k = _lengths(q, k, cu_seqlens_q, cu_seqlens_k, groups)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    name = backend.pick(_OPERATOR, q.device.type, _unfit(q))
    if name in ("cpu", "triton"):
        q, k, v = map(_rows_of_heads, (q, k, v))
        return _attend(q, k, v, starts_q, starts_k, _in_a_row(groups), scale, name)[0]
    return _by_library(q, k, v, starts_q, starts_k, groups, scale, name)


def token_self_attention(
    qkv: Tensor, cu_seqlens: Tensor | None, *, groups: Groups | None = None, scale: float | None = None
) -> Tensor:
    """`token_attention` of q, k and v that lie side by side, as one projection writes them.

    Args:
        qkv: (T, 3, H, d) floating.
        cu_seqlens: (N + 1,) int32, rows of each sequence; may be None with `groups`.
        groups: (sequences, length, length) of runs of equal lengths, on the host.
        scale: None takes 1 / sqrt(d).

    Returns:
        (T, H, d) of qkv's dtype. The gradient is one (T, 3, H, d) tensor.

    Raises:
        ValueError: as `token_attention`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, heads, head_dim) but has shape {tuple(qkv.shape)}")
    check_floating(qkv=qkv)
    for group in groups or ():
        if group[1] != group[2]:
            raise ValueError(f"groups must have one length for q and k but have {group[1]} and {group[2]}")
    name = backend.pick(_OPERATOR, qkv.device.type, _unfit(qkv))
    if name not in ("cpu", "triton"):
        q, k, v = qkv.unbind(1)
        return token_attention(q, k, v, cu_seqlens, groups=groups, scale=scale)
    q = qkv[:, 0]
    groups, starts, _ = _lengths(q, q, cu_seqlens, None, groups)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _self_attend(_rows_of_heads(qkv), starts, _in_a_row(groups), scale, name)[0]


def _unfit(q: Tensor) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call."""
    reasons = []
    if in_forward_mode():
        reasons += [(name, "it has no forward-mode derivative") for name in ("cpu", "triton")]
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons += [(name, f"head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}") for name in ("cpu", "triton")]
    for name, dtypes in (("cpu", _CPU_DTYPES), ("triton", _TRITON_DTYPES)):
        if q.dtype not in dtypes:
            reasons.append((name, f"it does not compute in {q.dtype}"))
    return tuple(reasons)


def _lengths(
    q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, groups: Groups | None
) -> tuple[Groups, Tensor, Tensor]:
    """Groups on the host and row ranges on the device, each from the other where only one is given."""
    if starts_q is None:
        if groups is None:
            raise ValueError("token_attention needs cu_seqlens_q or groups")
        if starts_k is not None:
            raise ValueError(f"cu_seqlens_q is None but cu_seqlens_k has shape {tuple(starts_k.shape)}")
        _check_groups(q, k, groups)
        return groups, cu_seqlens(groups, 1, q.device), cu_seqlens(groups, 2, q.device)
    starts_k = starts_q if starts_k is None else starts_k
    _check_starts(q, k, starts_q, starts_k)
    if groups is None:
        found_q, found_k = starts_q.tolist(), starts_k.tolist()
        _check_ranges("q", found_q, q)
        _check_ranges("k", found_k, k)
        lengths_q, lengths_k = ([b - a for a, b in itertools.pairwise(x)] for x in (found_q, found_k))
        groups = [(1, *lengths) for lengths in zip(lengths_q, lengths_k, strict=True)]
    else:
        _check_groups(q, k, groups)
        count = sum(group[0] for group in groups)
        if starts_q.shape[0] != count + 1:
            raise ValueError(f"cu_seqlens_q has {starts_q.shape[0] - 1} sequences but groups have {count}")
        if values_are_checked(starts_q):
            _check_agreement("q", starts_q, q, groups, 1)
            if starts_k is not starts_q or any(group[1] != group[2] for group in groups):
                _check_agreement("k", starts_k, k, groups, 2)
    return groups, starts_q.contiguous(), starts_k.contiguous()


def _check_groups(q: Tensor, k: Tensor, groups: Groups) -> None:
    for group in groups:
        if any(size < 0 for size in group):
            raise ValueError(f"groups must not be negative but have {tuple(group)}")
    for name, x, column in (("q", q, 1), ("k", k, 2)):
        rows = sum(group[0] * group[column] for group in groups)
        if rows != x.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} rows but its sequences have {rows}")


def _check_ranges(name: str, starts: list[int], x: Tensor) -> None:
    if starts[0] != 0 or starts[-1] != x.shape[0]:
        raise ValueError(f"cu_seqlens_{name} must run from 0 to {x.shape[0]} but runs from {starts[0]} to {starts[-1]}")
    for start, end in itertools.pairwise(starts):
        if end < start:
            raise ValueError(f"cu_seqlens_{name} must not fall but goes from {start} to {end}")


def _check_agreement(name: str, starts: Tensor, x: Tensor, groups: Groups, column: int) -> None:
    """Every layer of a model comes here: one comparison of lists, and the reason only where they differ."""
    expected = [0]
    for group in groups:
        count, length, at = group[0], group[column], expected[-1]
        expected += range(at + length, at + count * length + 1, length) if length else [at] * count
    found = starts.tolist()
    if found != expected:
        _check_ranges(name, found, x)
        place = next(i for i, start in enumerate(found) if start != expected[i])
        raise ValueError(f"cu_seqlens_{name}[{place}] is {found[place]} but groups put it at {expected[place]}")


def _in_a_row(groups: Groups) -> list[int]:
    """As an argument of a registered operator."""
    return [size for group in groups for size in group]


def _longest(groups: Groups, column: int) -> int:
    return max([0, *(group[column] for group in groups)])


def _check_starts(q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor) -> None:
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        if starts.dim() != 1 or starts.shape[0] < 1 or starts.dtype != torch.int32:
            raise ValueError(f"{name} must be (sequences + 1,) int32 but is {tuple(starts.shape)} {starts.dtype}")
        if starts.device != q.device:
            raise ValueError(f"{name} is on {starts.device} but q is on {q.device}")
    if starts_q.shape != starts_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {starts_q.shape[0] - 1} sequences but cu_seqlens_k has {starts_k.shape[0] - 1}"
        )


def _by_library(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, groups: Groups, scale: float, name: str
) -> Tensor:
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        longest = (_longest(groups, column) for column in (1, 2))
        return flash_attn_varlen_func(q, k, v, starts_q, starts_k, *longest, softmax_scale=scale)
    lengths_q, lengths_k = ([group[column] for group in groups for _ in range(group[0])] for column in (1, 2))
    if name == "xformers":
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]
    if name == "reference":
        return reference.token_attention(q, k, v, lengths_q, lengths_k, scale).to(q.dtype)
    return _by_groups(q, k, v, groups, scale)


def _by_groups(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """One batched call of torch for each run of sequences of the same lengths."""
    merged: list[list[int]] = []
    for count, length_q, length_k in groups:
        if merged and merged[-1][1:] == [length_q, length_k]:
            merged[-1][0] += count
        else:
            merged.append([count, length_q, length_k])
    outs, at_q, at_k = [], 0, 0
    for count, length_q, length_k in merged:
        end_q, end_k = at_q + count * length_q, at_k + count * length_k
        batched_q = q[at_q:end_q].view(count, length_q, *q.shape[1:]).transpose(1, 2)
        batched_k, batched_v = (x[at_k:end_k].view(count, length_k, *x.shape[1:]).transpose(1, 2) for x in (k, v))
        with without_autocast(q):
            outs.append(_batched(batched_q, batched_k, batched_v, scale).transpose(1, 2).flatten(0, 1))
        at_q, at_k = end_q, end_k
    return torch.cat(outs) if outs else q + k.sum() + v.sum()


def _batched(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(count, H, length, d) each. On a CPU SDPA is slower than its two products (docs/log.md)."""
    if q.device.type not in ("cpu", "meta"):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return (scale * q @ k.mT).softmax(dim=-1) @ v
