"""lowrank_product in Triton, bound by memory: query, out and their gradients cross it once each way.

Shapes: B images, P patches, K sparse tokens, D key width, E value width. All K tokens are in one tile. K, D and E are
compiled in (a model has one of each), P is not.

Forward: a program takes BLOCK_P patches of one image, all of D and then all of E. On an H100 with its 132
multiprocessors B=128, P=196 has 512 programs, two of which run at once on each; B=8, P=1024 has 128, one on each, with
the loads of three slices in flight.

Backward: grad_value and grad_key are sums over patches, so a program takes a slice of E, or of D, and goes through the
patches with the sum of its slice in registers. One pass reads grad_out and leaves, for each slice of E, its part of the
gradient of the localization, K wide; a small kernel takes that through the softmax; the second pass reads query and
writes its gradient. A single pass over tiles of patches would write, and read again, K (D + E) fp32 for every tile: at
B=128, P=196, K=16, D=768, E=512 in tiles of 64 that is 84 MB beside the 140 MB that have to be moved, against 16 MB
this way, by the shapes. Few images (B=8) do divide their patches, see `splits` in config.py.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.lowrank_product.config import Config, power_of_two
from stellar_fast.registry import Shape

CLAMPED_SCALE = tl.constexpr(1e7)  # 1 / COSINE_EPS: the scale of a row that is too short to have a direction


@triton.jit
def _halves(x):
    """fp32 as a sum of two bf16, to 2^-17 of it: tensor cores then multiply it by bf16 without losing it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc):
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
def _softmax(logits, k_mask):
    """Over the tokens; zero in the columns that pad them."""
    logits = tl.where(k_mask[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["P"])
def _forward_kernel(
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
        logits = _dot(query, tl.trans(key), logits)
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

    localization = _softmax(logits, k_mask)
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
        out = _dot(localization, value, tl.zeros((BLOCK_P, BLOCK_E), tl.float32))
        out_mask = p_mask[:, None] & e_mask[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + p[:, None] * E + e[None, :], mask=out_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + p[:, None] * E + e[None, :], out, mask=out_mask)


@triton.jit(do_not_specialize=["P"])
def _backward_value_kernel(
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
        localization = _softmax(tl.load(logits_ptr + offsets, mask=mask, other=0.0), k_mask)
        if value.dtype == tl.bfloat16:  # rounded once, for both products: what they give is rounded so as well
            grad_out = grad_out.to(tl.bfloat16)
        grad_localization = _dot(grad_out, tl.trans(value), tl.zeros((BLOCK_P, BLOCK_K), tl.float32))
        tl.store(grad_localization_ptr + offsets, grad_localization, mask=mask)
        # the long side first: Hopper's tensor cores take 64 rows at least, and K is 16
        grad_value = _dot(tl.trans(grad_out), localization.to(grad_out.dtype), grad_value)
    tl.store(grad_value_ptr + k[:, None] * E + e[None, :], tl.trans(grad_value), mask=value_mask)


@triton.jit(do_not_specialize=["P"])
def _backward_softmax_kernel(
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
    localization = _softmax(logits, k_mask)
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
def _backward_query_kernel(
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
        grad_query = _dot(grad_product, key, tl.zeros((BLOCK_P, BLOCK_D), tl.float32))
        if COSINE:
            query_back = tl.load(query_back_ptr + p, mask=p_mask, other=0.0)
            grad_query -= query_back[:, None] * query.to(tl.float32)
            key_back += tl.load(key_back_ptr + tile * K + k, mask=k_mask, other=0.0)
        tl.store(grad_query_ptr + p[:, None] * D + d[None, :], grad_query, mask=query_mask)
        grad_key = _dot(tl.trans(query), grad_product, grad_key)

    grad_key = tl.trans(grad_key)
    if COSINE:
        grad_key -= key_back[:, None] * key.to(tl.float32)
    tl.store(grad_key_ptr + k[:, None] * D + d[None, :], grad_key, mask=key_mask)


@triton.jit
def _sum_splits_kernel(splits_ptr, sum_ptr, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(B, SPLITS, N) fp32 to (B, N), always in the same order."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    splits_ptr += image * SPLITS * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(splits_ptr + split * N + n, mask=n < N, other=0.0)
    tl.store(sum_ptr + image * N + n, total, mask=n < N)


def _factor(D: int, temperature: float | None) -> float:
    return 1 / math.sqrt(D) if temperature is None else 1 / temperature


def launch_lowrank_product_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: float | None,
    bias: Tensor | None,
    return_localization: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (out, localization or (0,), peak, logits, query_scale, key_scale), all fp32.

    The last dimension of the inputs is contiguous; bias is contiguous.
    """
    (B, P, D), K, E = query.shape, key.shape[1], value.shape[2]
    tile = config.forward
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    out, logits, query_scale, key_scale = new(B, P, E), new(B, P, K), new(B, P), new(B, K)
    localization = new(B, P, K) if return_localization else new(0)
    peak = torch.zeros_like(key_scale)
    launch(
        _forward_kernel,
        (B, triton.cdiv(P, tile.block_p)),
        query,
        key,
        value,
        bias,
        out,
        localization if return_localization else None,
        peak,
        logits,
        query_scale,
        key_scale,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        _factor(D, temperature),
        P,
        K=K,
        D=D,
        E=E,
        COSINE=temperature is not None,
        BLOCK_P=tile.block_p,
        BLOCK_K=power_of_two(K),
        BLOCK_D=tile.block_d,
        BLOCK_E=tile.block_e,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, localization, peak, logits, query_scale, key_scale


def launch_lowrank_product_bwd(
    grad_out: Tensor,
    grad_localization: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    temperature: float | None,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_query, grad_key, grad_value), contiguous, each in the dtype of its input."""
    (B, P, D), K, E = query.shape, key.shape[1], value.shape[2]
    tile = config.backward
    parts = triton.cdiv(E, tile.block_e)
    blocks = triton.cdiv(P, tile.block_p)
    tiles = triton.cdiv(blocks, config.splits)  # of a program
    splits = triton.cdiv(blocks, tiles)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_key_splits, grad_value_splits = grad_key, grad_value
    if splits > 1:
        grad_key_splits, grad_value_splits = (
            x.new_empty(B, splits, *x.shape[1:], dtype=torch.float32) for x in (key, value)
        )
    grad_localization_parts = logits.new_empty(B, parts, P, K)
    grad_product, query_back = torch.empty_like(logits), torch.empty_like(query_scale)
    key_back = logits.new_empty(B, splits * tiles, K)
    cosine, factor = temperature is not None, _factor(D, temperature)
    knobs = {"K": K, "BLOCK_P": tile.block_p, "BLOCK_K": power_of_two(K)}
    launch(
        _backward_value_kernel,
        (B, parts, splits),
        grad_out,
        value,
        logits,
        grad_value_splits,
        grad_localization_parts,
        *value.stride()[:2],
        P,
        E=E,
        TILES=tiles,
        BLOCK_E=tile.block_e,
        num_warps=tile.num_warps,
        num_stages=1,  # its one long load feeds two products in two layouts, which triton does not pipeline
        **knobs,
    )
    launch(
        _backward_softmax_kernel,
        (B, splits * tiles),
        grad_localization_parts,
        grad_localization,
        logits,
        query_scale,
        key_scale,
        grad_product,
        query_back,
        key_back,
        factor,
        P,
        COSINE=cosine,
        PARTS=parts,
        num_warps=4,
        **knobs,
    )
    launch(
        _backward_query_kernel,
        (B, triton.cdiv(D, tile.block_d), splits),
        query,
        key,
        grad_product,
        query_back,
        key_back,
        grad_query,
        grad_key_splits,
        *query.stride()[:2],
        *key.stride()[:2],
        P,
        D=D,
        COSINE=cosine,
        TILES=tiles,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **knobs,
    )
    if splits > 1:
        for parts_of, total in ((grad_key_splits, grad_key), (grad_value_splits, grad_value)):
            N, block = K * total.shape[2], 1024
            launch(
                _sum_splits_kernel,
                (B, triton.cdiv(N, block)),
                parts_of,
                total,
                N=N,
                SPLITS=splits,
                BLOCK=block,
                num_warps=4,
            )
    return grad_query, grad_key, grad_value


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: with and without the optional tensors, cosine or scaled dot."""
    B, P, K, D, E = (shape[letter] for letter in "BPKDE")

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    query, key, value = new(B, P, D, dtype=dtype), new(B, K, D, dtype=dtype), new(B, K, E, dtype=dtype)
    for temperature, bias, grad_localization in ((0.06, new(P, E), None), (None, None, new(B, P, K))):
        _, _, _, logits, query_scale, key_scale = launch_lowrank_product_fwd(
            query, key, value, temperature, bias, grad_localization is not None, config
        )
        launch_lowrank_product_bwd(
            new(B, P, E), grad_localization, query, key, value, logits, query_scale, key_scale, temperature, config
        )
