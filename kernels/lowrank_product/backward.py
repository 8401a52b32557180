"""The backward of lowrank_product on a GPU. Letters as in kernel.py.

grad_value and grad_key are sums over patches, so a program takes a slice of E, or of D, and goes through the
patches with the sum of its slice in registers. One pass reads grad_out and leaves, for each slice of E, its part of the
gradient of the localization, K wide; a small kernel takes that through the softmax; the second pass reads query and
writes its gradient. A single pass over tiles of patches would write, and read again, K (D + E) fp32 for every tile: at
B=128, P=196, K=16, D=768, E=512 in tiles of 64 that is 84 MB beside the 140 MB that have to be moved, against 16 MB
this way, by the shapes. Few images (B=8) do divide their patches, see `splits` in config.py.
"""

import triton
import triton.language as tl

from stellar_fast.kernels.lowrank_product.forward import CLAMPED_SCALE, dot_mixed, softmax


@triton.jit(do_not_specialize=["P"])
def backward_value_kernel(
    grad_out_ptr,
    value_ptr,
    logits_ptr,
    grad_value_ptr,  # (B, splits, K, E)
    grad_localization_ptr,  # (B, slices of E, P, K): the part of each slice
    value_stride_b,
    value_stride_k,
    P,
    K: tl.constexpr,
    E: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A slice of E of one image, TILES times BLOCK_P patches of it."""
    image, part, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    k_mask, e_mask = k < K, e < E
    value_mask = k_mask[:, None] & e_mask[None, :]
    value = tl.load(
        value_ptr + image * value_stride_b + k[:, None] * value_stride_k + e[None, :], mask=value_mask, other=0.0
    )
    grad_out_ptr += image * P * E
    logits_ptr += image * P * K
    grad_localization_ptr += (image * tl.num_programs(1) + part) * P * K
    grad_value_ptr += (image * tl.num_programs(2) + split) * K * E

    grad_value = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
    for tile in range(TILES):
        p = (split * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        p_mask = p < P
        grad_out = tl.load(
            grad_out_ptr + p[:, None] * E + e[None, :], mask=p_mask[:, None] & e_mask[None, :], other=0.0
        )
        offsets, mask = p[:, None] * K + k[None, :], p_mask[:, None] & k_mask[None, :]
        localization = softmax(tl.load(logits_ptr + offsets, mask=mask, other=0.0), k_mask)
        if value.dtype == tl.bfloat16:  # rounded once, for both products: what they give is rounded so as well
            grad_out = grad_out.to(tl.bfloat16)
        grad_localization = dot_mixed(grad_out, tl.trans(value), tl.zeros((BLOCK_P, BLOCK_K), tl.float32))
        tl.store(grad_localization_ptr + offsets, grad_localization, mask=mask)
        # the long side first: Hopper's tensor cores take 64 rows at least, and K is 16
        grad_value = dot_mixed(tl.trans(grad_out), localization.to(grad_out.dtype), grad_value)
    tl.store(grad_value_ptr + k[:, None] * E + e[None, :], tl.trans(grad_value), mask=value_mask)


@triton.jit(do_not_specialize=["P"])
def backward_softmax_kernel(
    grad_localization_parts_ptr,  # (B, PARTS, P, K)
    grad_localization_ptr,  # (B, P, K), None without
    logits_ptr,
    query_scale_ptr,
    key_scale_ptr,
    grad_product_ptr,  # (B, P, K): of the products of the raw rows
    query_back_ptr,  # (B, P): what the normalisation takes away of each row, as a multiple of it
    key_back_ptr,  # (B, blocks, K): the same of the keys, for BLOCK_P patches each
    factor,
    P,
    K: tl.constexpr,
    COSINE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Everything between the two passes, on (P, K) alone: BLOCK_P patches of one image."""
    image, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    p_mask, k_mask = p < P, k < K
    offsets, mask = p[:, None] * K + k[None, :], p_mask[:, None] & k_mask[None, :]
    grad = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    if grad_localization_ptr is not None:
        grad += tl.load(grad_localization_ptr + image * P * K + offsets, mask=mask, other=0.0)
    for part in tl.static_range(PARTS):
        grad += tl.load(grad_localization_parts_ptr + (image * PARTS + part) * P * K + offsets, mask=mask, other=0.0)
    logits = tl.load(logits_ptr + image * P * K + offsets, mask=mask, other=0.0)
    localization = softmax(logits, k_mask)
    grad = localization * (grad - tl.sum(localization * grad, 1)[:, None])  # of the logits

    if COSINE:
        query_scale = tl.load(query_scale_ptr + image * P + p, mask=p_mask, other=0.0)
        key_scale = tl.load(key_scale_ptr + image * K + k, mask=k_mask, other=0.0)
        along = grad * logits
        query_back = tl.where(query_scale < CLAMPED_SCALE, query_scale * query_scale * tl.sum(along, 1), 0.0)
        key_back = tl.where(key_scale < CLAMPED_SCALE, key_scale * key_scale * tl.sum(along, 0), 0.0)
        tl.store(query_back_ptr + image * P + p, query_back, mask=p_mask)
        tl.store(key_back_ptr + (image * tl.num_programs(1) + tile) * K + k, key_back, mask=k_mask)
        grad *= query_scale[:, None] * key_scale[None, :]
    tl.store(grad_product_ptr + image * P * K + offsets, grad * factor, mask=mask)


@triton.jit(do_not_specialize=["P"])
def backward_query_kernel(
    query_ptr,
    key_ptr,
    grad_product_ptr,
    query_back_ptr,
    key_back_ptr,
    grad_query_ptr,
    grad_key_ptr,  # (B, splits, K, D)
    query_stride_b,
    query_stride_p,
    key_stride_b,
    key_stride_k,
    P,
    K: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A slice of D of one image, TILES times BLOCK_P patches of it."""
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k_mask, d_mask = k < K, d < D
    key_mask = k_mask[:, None] & d_mask[None, :]
    key = tl.load(key_ptr + image * key_stride_b + k[:, None] * key_stride_k + d[None, :], mask=key_mask, other=0.0)
    query_ptr += image * query_stride_b
    grad_product_ptr += image * P * K
    query_back_ptr += image * P
    key_back_ptr += image * tl.num_programs(2) * TILES * K
    grad_query_ptr += image * P * D
    grad_key_ptr += (image * tl.num_programs(2) + split) * K * D

    grad_key = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    key_back = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(TILES):
        tile = split * TILES + step
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        p_mask = p < P
        query_mask = p_mask[:, None] & d_mask[None, :]
        query = tl.load(query_ptr + p[:, None] * query_stride_p + d[None, :], mask=query_mask, other=0.0)
        grad_product = tl.load(
            grad_product_ptr + p[:, None] * K + k[None, :], mask=p_mask[:, None] & k_mask[None, :], other=0.0
        )
        grad_query = dot_mixed(grad_product, key, tl.zeros((BLOCK_P, BLOCK_D), tl.float32))
        if COSINE:
            query_back = tl.load(query_back_ptr + p, mask=p_mask, other=0.0)
            grad_query -= query_back[:, None] * query.to(tl.float32)
            key_back += tl.load(key_back_ptr + tile * K + k, mask=k_mask, other=0.0)
        tl.store(grad_query_ptr + p[:, None] * D + d[None, :], grad_query, mask=query_mask)
        grad_key = dot_mixed(tl.trans(query), grad_product, grad_key)

    grad_key = tl.trans(grad_key)
    if COSINE:
        grad_key -= key_back[:, None] * key.to(tl.float32)
    tl.store(grad_key_ptr + k[:, None] * D + d[None, :], grad_key, mask=key_mask)


@triton.jit
def sum_splits_kernel(splits_ptr, sum_ptr, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(B, SPLITS, N) fp32 to (B, N), always in the same order."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    splits_ptr += image * SPLITS * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(splits_ptr + split * N + n, mask=n < N, other=0.0)
    tl.store(sum_ptr + image * N + n, total, mask=n < N)
