"""The forward of lowrank_product on a GPU, and what both directions share. Letters as in kernel.py.

A program takes BLOCK_P patches of one image, all of D and then all of E. On an H100 with its 132 multiprocessors B=128,
P=196 has 512 programs, two of which run at once on each; B=8, P=1024 has 128, one on each, with the loads of three
slices in flight.
"""

import triton
import triton.language as tl

from stellar_fast.kernels.common.tl_dot import dot

CLAMPED_SCALE = tl.constexpr(1e7)  # 1 / COSINE_EPS: the scale of a row that is too short to have a direction


@triton.jit
def _halves(x):
    """fp32 as a sum of two bf16, to 2^-17 of it: tensor cores then multiply it by bf16 without losing it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_mixed(a, b, acc):
    """``acc + a b`` for any pair of dtypes; fp16 beside fp32 is widened, since gradients leave its range."""
    if a.dtype == b.dtype:
        return dot(a, b, acc)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, low = _halves(a)
        return dot(low, b, dot(high, b, acc))
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, low = _halves(b)
        return dot(a, low, dot(a, high, acc))
    else:
        return dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def _scale_of(square_sum):
    norm = tl.sqrt(square_sum)
    return tl.where(norm > 1.0 / CLAMPED_SCALE, 1.0 / tl.maximum(norm, 1.0 / CLAMPED_SCALE), CLAMPED_SCALE)


@triton.jit
def softmax(logits, k_mask):
    """Over the tokens; zero in the columns that pad them."""
    logits = tl.where(k_mask[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["P"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,  # None without
    out_ptr,
    localization_ptr,  # None where it is not asked for
    peak_ptr,  # zero at first
    logits_ptr,
    query_scale_ptr,
    key_scale_ptr,
    query_stride_b,
    query_stride_p,
    key_stride_b,
    key_stride_k,
    value_stride_b,
    value_stride_k,
    factor,
    P,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_P patches of one image, all of D, then all of E."""
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    p_mask, k_mask = p < P, k < K
    query_ptr += image * query_stride_b
    key_ptr += image * key_stride_b
    value_ptr += image * value_stride_b
    out_ptr += image * P * E

    # Products of the raw rows, scaled afterwards: the norms come out of the same pass.
    logits = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    query_square = tl.zeros((BLOCK_P,), tl.float32)
    key_square = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = d < D
        query = tl.load(
            query_ptr + p[:, None] * query_stride_p + d[None, :], mask=p_mask[:, None] & d_mask[None, :], other=0.0
        )
        key = tl.load(
            key_ptr + k[:, None] * key_stride_k + d[None, :], mask=k_mask[:, None] & d_mask[None, :], other=0.0
        )
        logits = dot_mixed(query, tl.trans(key), logits)
        if COSINE:
            query_square += tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)
            key_square += tl.sum(key.to(tl.float32) * key.to(tl.float32), 1)
    if COSINE:
        query_scale, key_scale = _scale_of(query_square), _scale_of(key_square)
        logits = logits * query_scale[:, None] * key_scale[None, :] * factor
    else:
        query_scale = tl.zeros((BLOCK_P,), tl.float32) + factor
        key_scale = tl.zeros((BLOCK_K,), tl.float32) + 1.0
        logits *= factor
    tl.store(query_scale_ptr + image * P + p, query_scale, mask=p_mask)
    if tl.program_id(1) == 0:
        tl.store(key_scale_ptr + image * K + k, key_scale, mask=k_mask)

    localization = softmax(logits, k_mask)
    tile, tile_mask = image * P * K + p[:, None] * K + k[None, :], p_mask[:, None] & k_mask[None, :]
    tl.store(logits_ptr + tile, logits, mask=tile_mask)
    if localization_ptr is not None:
        tl.store(localization_ptr + tile, localization, mask=tile_mask)
    # a maximum does not depend on the order of the tiles, so an atomic one is deterministic
    tl.atomic_max(peak_ptr + image * K + k, tl.max(tl.where(p_mask[:, None], localization, 0.0), 0), mask=k_mask)

    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        e_mask = e < E
        value = tl.load(
            value_ptr + k[:, None] * value_stride_k + e[None, :], mask=k_mask[:, None] & e_mask[None, :], other=0.0
        )
        out = dot_mixed(localization, value, tl.zeros((BLOCK_P, BLOCK_E), tl.float32))
        out_mask = p_mask[:, None] & e_mask[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + p[:, None] * E + e[None, :], mask=out_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + p[:, None] * E + e[None, :], out, mask=out_mask)
