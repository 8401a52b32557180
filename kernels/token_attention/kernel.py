"""Triton kernels of token_attention: packed block-diagonal attention for short sequences, forward and backward.

One program works for one (sequence, head). In the names of tiles Q and K stand for its rows of queries and of keys, D
for the head's width, padded to BLOCK_D; tiles hold zeros beyond the sequence's length and the head's width.
Exponentials are powers of two, which the hardware has: `scale_log2` is the scale times log2(e). No atomics: results do
not change from run to run.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.kernels.common.tl_dot import INTERPRETED, dot
from stellar_fast.kernels.token_attention.config import Config
from stellar_fast.registry import Shape

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A row's maximum before its first key: below every score, and finite, so that -inf less it is no NaN.
LOWEST = tl.constexpr(-3.0e38)

# One compilation serves every number of rows, and slices of cu_seqlens, which are not aligned.
_jit = triton.jit(
    do_not_specialize=["lse_head", "delta_head"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k"],
)


@triton.jit
def _sequence(cu_seqlens, index):
    """First row, in 64 bits since strides multiply it (as heads are), and length."""
    first = tl.load(cu_seqlens + index)
    return first.to(tl.int64), tl.load(cu_seqlens + index + 1) - first


@triton.jit
def _loop_end(length, LONGEST: tl.constexpr):
    # triton 3.6's interpreter wants a constant: the longest length, since tiles of nothing change nothing
    return LONGEST if INTERPRETED else length


@triton.jit
def _places(base, row_stride, first, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK, BLOCK_D) to rows first : first + BLOCK of a sequence's head, and which of them exist."""
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None]
    if D < BLOCK_D:
        inside = inside & (columns < D)[None, :]
    return base + rows[:, None] * row_stride + columns[None, :], inside


@triton.jit
def _load(base, row_stride, first, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, inside = _places(base, row_stride, first, length, BLOCK, D, BLOCK_D)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(base, row_stride, first, length, tile, D: tl.constexpr):
    pointers, inside = _places(base, row_stride, first, length, tile.shape[0], D, tile.shape[1])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(base, first, length, BLOCK: tl.constexpr):
    """One number a row."""
    rows = first + tl.arange(0, BLOCK)
    return tl.load(base + rows, mask=rows < length, other=0.0)


@_jit
def token_attention_fwd(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head,
    tiles, scale_log2,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr, LONGEST_K: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys: by online softmax, or at once where the keys are one tile."""
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    sequence = tl.program_id(0) // tiles // HEADS
    first_q, length_q = _sequence(cu_seqlens_q, sequence)
    start_q = tile * BLOCK_Q
    if start_q >= length_q:
        return
    first_k, length_k = _sequence(cu_seqlens_k, sequence)
    q += first_q * q_row + head * q_head
    k += first_k * k_row + head * k_head
    v += first_k * v_row + head * v_head
    out += first_q * out_row + head * out_head
    lse += first_q + head * lse_head

    q_QD = _load(q, q_row, start_q, length_q, BLOCK_Q, D, BLOCK_D)
    peak_Q = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    acc_QD = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, BLOCK_K if ONE_TILE else _loop_end(length_k, LONGEST_K), BLOCK_K):
        k_KD = _load(k, k_row, start, length_k, BLOCK_K, D, BLOCK_D)
        v_KD = _load(v, v_row, start, length_k, BLOCK_K, D, BLOCK_D)
        valid_K = start + tl.arange(0, BLOCK_K) < length_k
        s_QK = tl.where(valid_K[None, :], dot(q_QD, tl.trans(k_KD)) * scale_log2, float("-inf"))
        before_Q, peak_Q = peak_Q, tl.maximum(peak_Q, tl.max(s_QK, 1))
        p_QK = tl.exp2(s_QK - peak_Q[:, None])
        if ONE_TILE:
            total_Q = tl.sum(p_QK, 1)
        else:
            shrink_Q = tl.exp2(before_Q - peak_Q)
            total_Q = total_Q * shrink_Q + tl.sum(p_QK, 1)
            acc_QD *= shrink_Q[:, None]
        acc_QD = dot(p_QK.to(v_KD.dtype), v_KD, acc_QD)

    # no keys: a total of 0, out is 0 and lse -inf
    _store(out, out_row, start_q, length_q, acc_QD / tl.where(total_Q == 0, 1.0, total_Q)[:, None], D)
    queries = start_q + tl.arange(0, BLOCK_Q)
    tl.store(lse + queries, (peak_Q + tl.log2(total_Q)) * LN_2, mask=queries < length_q)


@triton.jit
def _probabilities(k_KD, q_QD, lse_Q, valid_K, scale_log2):
    """exp(score - lse), transposed: P and dS are then left operands of dv and dk straight from the tensor core."""
    s_KQ = dot(k_KD, tl.trans(q_QD)) * scale_log2
    return tl.exp2(tl.where(valid_K[:, None], s_KQ - lse_Q[None, :] * LOG2_E, float("-inf")))


@_jit
def token_attention_bwd_whole(
    grad_out, q, k, v, lse, grad_q, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k,
    grad_out_row, grad_out_head, q_row, q_head, k_row, k_head, v_row, v_head,
    grad_q_row, grad_q_head, grad_k_row, grad_k_head, grad_v_row, grad_v_head, lse_head,
    scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr, LONGEST_Q: tl.constexpr,
):  # fmt: skip
    """All three gradients where the keys are one tile: every input read once, every gradient written once.

    With all of a row's keys here, rowsum(P dP) serves for what is usually taken as rowsum(dO O), so `out` is not read.
    Its error is 2^-24 |lse|, that of a 16-bit `out` 2^-12 or more; fp32 is better off with `out`, in the kernels below.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    sequence = tl.program_id(0) // HEADS
    first_q, length_q = _sequence(cu_seqlens_q, sequence)
    first_k, length_k = _sequence(cu_seqlens_k, sequence)
    grad_out += first_q * grad_out_row + head * grad_out_head
    q += first_q * q_row + head * q_head
    k += first_k * k_row + head * k_head
    v += first_k * v_row + head * v_head
    lse += first_q + head * lse_head
    grad_q += first_q * grad_q_row + head * grad_q_head
    grad_k += first_k * grad_k_row + head * grad_k_head
    grad_v += first_k * grad_v_row + head * grad_v_head

    k_KD = _load(k, k_row, 0, length_k, BLOCK_K, D, BLOCK_D)
    v_KD = _load(v, v_row, 0, length_k, BLOCK_K, D, BLOCK_D)
    valid_K = tl.arange(0, BLOCK_K) < length_k
    dk_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, BLOCK_Q if ONE_TILE else _loop_end(length_q, LONGEST_Q), BLOCK_Q):
        q_QD = _load(q, q_row, start, length_q, BLOCK_Q, D, BLOCK_D)
        do_QD = _load(grad_out, grad_out_row, start, length_q, BLOCK_Q, D, BLOCK_D)
        p_KQ = _probabilities(k_KD, q_QD, _load_rows(lse, start, length_q, BLOCK_Q), valid_K, scale * LOG2_E)
        dv_KD = dot(p_KQ.to(do_QD.dtype), do_QD, dv_KD)
        if ONE_TILE:  # each gradient is written once it is there: held to the end they cost sm_90 50 registers a thread
            _store(grad_v, grad_v_row, 0, length_k, dv_KD, D)
        dp_KQ = dot(v_KD, tl.trans(do_QD))
        ds_KQ = (p_KQ * (dp_KQ - tl.sum(p_KQ * dp_KQ, 0)[None, :])).to(q_QD.dtype)
        dk_KD = dot(ds_KQ, q_QD, dk_KD)
        if ONE_TILE:
            _store(grad_k, grad_k_row, 0, length_k, dk_KD * scale, D)
        _store(grad_q, grad_q_row, start, length_q, dot(tl.trans(ds_KQ), k_KD) * scale, D)
    if not ONE_TILE:
        _store(grad_v, grad_v_row, 0, length_k, dv_KD, D)
        _store(grad_k, grad_k_row, 0, length_k, dk_KD * scale, D)


@_jit
def token_attention_bwd_delta(
    grad_out, out, delta, cu_seqlens_q, grad_out_row, grad_out_head, out_row, out_head, delta_head, tiles,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rowsum(dO O) of one tile of queries: taken in the next kernel, it costs 60 registers and a third tile to load."""
    start = tl.program_id(0) % tiles * BLOCK
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    first, length = _sequence(cu_seqlens_q, tl.program_id(0) // tiles // HEADS)
    if start >= length:
        return
    grad_out += first * grad_out_row + head * grad_out_head
    out += first * out_row + head * out_head
    do_QD = _load(grad_out, grad_out_row, start, length, BLOCK, D, BLOCK_D).to(tl.float32)
    out_QD = _load(out, out_row, start, length, BLOCK, D, BLOCK_D).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    tl.store(delta + first + head * delta_head + rows, tl.sum(do_QD * out_QD, 1), mask=rows < length)


@_jit
def token_attention_bwd_tiled(
    grad_out, q, k, v, lse, delta, grad_q, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k,
    grad_out_row, grad_out_head, q_row, q_head, k_row, k_head, v_row, v_head,
    grad_q_row, grad_q_head, grad_k_row, grad_k_head, grad_v_row, grad_v_head, lse_head,
    tiles, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    LONGEST_Q: tl.constexpr, LONGEST_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of a tile of keys, then grad_q of the tile of queries in the same place.

    One launch for both: the programs of a sequence run beside each other, so what they share comes from the cache.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    sequence = tl.program_id(0) // tiles // HEADS
    first_q, length_q = _sequence(cu_seqlens_q, sequence)
    first_k, length_k = _sequence(cu_seqlens_k, sequence)
    grad_out += first_q * grad_out_row + head * grad_out_head
    q += first_q * q_row + head * q_head
    k += first_k * k_row + head * k_head
    v += first_k * v_row + head * v_head
    lse += first_q + head * lse_head
    delta += first_q + head * lse_head
    grad_q += first_q * grad_q_row + head * grad_q_head
    grad_k += first_k * grad_k_row + head * grad_k_head
    grad_v += first_k * grad_v_row + head * grad_v_head

    first = tile * BLOCK
    if first < length_k:
        k_KD = _load(k, k_row, first, length_k, BLOCK, D, BLOCK_D)
        v_KD = _load(v, v_row, first, length_k, BLOCK, D, BLOCK_D)
        valid_K = first + tl.arange(0, BLOCK) < length_k
        dk_KD = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        dv_KD = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, _loop_end(length_q, LONGEST_Q), STEP):
            q_QD = _load(q, q_row, start, length_q, STEP, D, BLOCK_D)
            do_QD = _load(grad_out, grad_out_row, start, length_q, STEP, D, BLOCK_D)
            p_KQ = _probabilities(k_KD, q_QD, _load_rows(lse, start, length_q, STEP), valid_K, scale * LOG2_E)
            dv_KD = dot(p_KQ.to(do_QD.dtype), do_QD, dv_KD)
            ds_KQ = p_KQ * (dot(v_KD, tl.trans(do_QD)) - _load_rows(delta, start, length_q, STEP)[None, :])
            dk_KD = dot(ds_KQ.to(q_QD.dtype), q_QD, dk_KD)
        _store(grad_v, grad_v_row, first, length_k, dv_KD, D)
        _store(grad_k, grad_k_row, first, length_k, dk_KD * scale, D)

    if first < length_q:
        q_QD = _load(q, q_row, first, length_q, BLOCK, D, BLOCK_D)
        do_QD = _load(grad_out, grad_out_row, first, length_q, BLOCK, D, BLOCK_D)
        lse_Q = _load_rows(lse, first, length_q, BLOCK) * LOG2_E
        delta_Q = _load_rows(delta, first, length_q, BLOCK)
        dq_QD = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, _loop_end(length_k, LONGEST_K), STEP):
            k_KD = _load(k, k_row, start, length_k, STEP, D, BLOCK_D)
            v_KD = _load(v, v_row, start, length_k, STEP, D, BLOCK_D)
            valid_K = start + tl.arange(0, STEP) < length_k
            s_QK = dot(q_QD, tl.trans(k_KD)) * (scale * LOG2_E)
            p_QK = tl.exp2(tl.where(valid_K[None, :], s_QK - lse_Q[:, None], float("-inf")))
            ds_QK = p_QK * (dot(do_QD, tl.trans(v_KD)) - delta_Q[:, None])
            dq_QD = dot(ds_QK.to(k_KD.dtype), k_KD, dq_QD)
        _store(grad_q, grad_q_row, first, length_q, dq_QD * scale, D)


def _strides(*tensors: Tensor) -> list[int]:
    """Row and head stride of each; the last dimension is contiguous."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _if_interpreted(length: int) -> int:
    """A length that no compiled kernel reads: one compilation serves all."""
    return length if INTERPRETED.value else 0


def launch_token_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scale: float,
    config: Config,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (Tq, H, d) of q's dtype and lse (H, Tq) fp32, written into the two tensors of `into` where given.

    q (Tq,H,d), k and v (Tk,H,d) may have any row and head stride. Only rows of the sequences in cu_seqlens are written:
    slices of both, with the maximal lengths of that part, serve a part of the batch.
    """
    heads, head_dim = q.shape[1:]
    if into is None:
        into = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((heads, len(q)), dtype=torch.float32)
    out, lse = into
    tile = config.forward
    tiles = triton.cdiv(max_length_q, tile.block_q)
    launch(
        token_attention_fwd,
        (tiles * heads * (len(cu_seqlens_q) - 1),),
        *(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *_strides(q, k, v, out), lse.stride(0)),
        *(tiles, scale * math.log2(math.e)),
        HEADS=heads,
        D=head_dim,
        BLOCK_D=dot_size(head_dim),
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        ONE_TILE=max_length_k <= tile.block_k,
        LONGEST_K=_if_interpreted(max_length_k),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


def launch_token_attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scale: float,
    config: Config,
    *,
    out_grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, written into the three tensors of `out_grads` where given.

    All tensors but lse may have any row and head stride; as in the forward, cu_seqlens may be of a part of the batch.
    """
    heads, head_dim = q.shape[1:]
    if out_grads is None:
        out_grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    grad_q, grad_k, grad_v = out_grads
    tile = config.backward
    sequences = len(cu_seqlens_q) - 1
    constants = {"HEADS": heads, "D": head_dim, "BLOCK_D": dot_size(head_dim)}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if max_length_k <= tile.block_k and q.dtype != torch.float32:
        launch(
            token_attention_bwd_whole,
            (heads * sequences,),
            *(grad_out, q, k, v, lse, grad_q, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k),
            *(*_strides(grad_out, q, k, v, grad_q, grad_k, grad_v), lse.stride(0), scale),
            BLOCK_Q=tile.block_q,
            BLOCK_K=tile.block_k,
            ONE_TILE=max_length_q <= tile.block_q,
            LONGEST_Q=_if_interpreted(max_length_q),
            **constants,
            **options,
        )
        return grad_q, grad_k, grad_v

    delta = torch.empty_like(lse)
    tiles_q = triton.cdiv(max_length_q, tile.block_k)
    launch(
        token_attention_bwd_delta,
        (tiles_q * heads * sequences,),
        *(grad_out, out, delta, cu_seqlens_q, *_strides(grad_out, out), delta.stride(0), tiles_q),
        BLOCK=tile.block_k,
        **constants,
        num_warps=tile.num_warps,
    )
    tiles = max(tiles_q, triton.cdiv(max_length_k, tile.block_k))
    launch(
        token_attention_bwd_tiled,
        (tiles * heads * sequences,),
        *(grad_out, q, k, v, lse, delta, grad_q, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k),
        *(*_strides(grad_out, q, k, v, grad_q, grad_k, grad_v), lse.stride(0), tiles, scale),
        BLOCK=tile.block_k,
        STEP=tile.block_q,
        LONGEST_Q=_if_interpreted(max_length_q),
        LONGEST_K=_if_interpreted(max_length_k),
        **constants,
        **options,
    )
    return grad_q, grad_k, grad_v


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: both directions, q, k and v views of one tensor where they can be."""
    N, H, d, Lq, Lk = (shape[letter] for letter in ("N", "H", "d", "Lq", "Lk"))
    packed = torch.empty(N * Lk, 3, H, d, dtype=dtype, device="meta")
    q, k, v = packed.unbind(1)
    if Lq != Lk:
        q = torch.empty(N * Lq, H, d, dtype=dtype, device="meta")
    starts = torch.empty(N + 1, dtype=torch.int32, device="meta")
    of_batch = (starts, starts, Lq, Lk, d**-0.5, config)
    out, lse = launch_token_attention_fwd(q, k, v, *of_batch)
    launch_token_attention_bwd(out, q, k, v, out, lse, *of_batch)
