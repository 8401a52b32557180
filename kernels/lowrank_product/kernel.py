"""lowrank_product in Triton, bound by memory: query, out and their gradients cross it once each way.

Shapes: B images, P patches, K sparse tokens, D key width, E value width. All K tokens are in one tile. K, D and E are
compiled in (a model has one of each), P is not. The kernels are in forward.py and backward.py.
"""

import functools
import math

import torch
import triton
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.kernels.lowrank_product.backward import (
    backward_query_kernel,
    backward_softmax_kernel,
    backward_value_kernel,
    sum_splits_kernel,
)
from stellar_fast.kernels.lowrank_product.config import Config
from stellar_fast.kernels.lowrank_product.forward import forward_kernel
from stellar_fast.registry import Shape


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
        forward_kernel,
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
        BLOCK_K=dot_size(K),
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
    knobs = {"K": K, "BLOCK_P": tile.block_p, "BLOCK_K": dot_size(K)}
    launch(
        backward_value_kernel,
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
        backward_softmax_kernel,
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
        backward_query_kernel,
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
                sum_splits_kernel,
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
