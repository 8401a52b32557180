"""koleo in Triton: a program takes one image, in slices of its tokens' width.

Shapes: N images, K tokens of width D. K and D are compiled in (a model has one or two of each), N is not.
Tokens are divided by their norms, to the last bit, as torch does it: with a product by 1 / norm tokens that are nearly
equal would have other differences, and with it fused into the difference even equal ones would have some.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.koleo.config import Config
from stellar_fast.registry import Shape

EPS = tl.constexpr(1e-8)  # the smallest norm, what is added to every difference and within the logarithm


@triton.jit
def _difference(
    x_ptr,
    x_stride_k,
    nearest,
    norm,
    nearest_norm,
    start,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A slice of the normalised tokens, and what each is off from its neighbour, zero in what pads it."""
    k, d = tl.arange(0, BLOCK_K), start + tl.arange(0, BLOCK_D)
    mask = (k < K)[:, None] & (d < D)[None, :]
    own = tl.load(x_ptr + k[:, None] * x_stride_k + d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + nearest[:, None] * x_stride_k + d[None, :], mask=mask, other=0.0).to(tl.float32)
    own = tl.div_rn(own, norm[:, None])
    return own, tl.where(mask, own - tl.div_rn(other, nearest_norm[:, None]) + EPS, 0.0)


@triton.jit
def _forward_kernel(
    x_ptr,
    loss_ptr,  # (N,)
    index_ptr,
    distance_ptr,
    norm_ptr,
    x_stride_n,
    x_stride_k,
    min_distance,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    x_ptr += image * x_stride_n
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    valid = k < K
    products = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = valid[:, None] & (start + d < D)[None, :]
        x = tl.load(x_ptr + k[:, None] * x_stride_k + start + d[None, :], mask=mask, other=0.0)
        products = dot(x, tl.trans(x), products)
        wide = x.to(tl.float32)
        squares += wide * wide
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    norm = tl.where(norm <= EPS, EPS, norm)  # a NaN stays one
    # the norm of a row does not change which of it is the largest; a NaN never is
    similarity = products / norm[None, :]
    others = valid[None, :] & (k[:, None] != k[None, :]) & (similarity == similarity)
    nearest = tl.argmax(tl.where(others, similarity, float("-inf")), 1)
    nearest_norm = tl.sum(tl.where(nearest[:, None] == k[None, :], norm[None, :], 0.0), 1)
    squares = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        _, off = _difference(x_ptr, x_stride_k, nearest, norm, nearest_norm, start, K, D, BLOCK_K, BLOCK_D)
        squares += off * off
    distance = tl.sqrt_rn(tl.sum(squares, 1))
    floored = tl.where(distance < min_distance, min_distance, distance)
    loss = tl.sum(tl.where(valid, -tl.log(0.5 * floored + EPS), 0.0), 0) / K
    tl.store(loss_ptr + image, loss)
    tl.store(index_ptr + image * K + k, nearest.to(tl.int64), mask=valid)
    tl.store(distance_ptr + image * K + k, distance, mask=valid)
    tl.store(norm_ptr + image * K + k, norm, mask=valid)


@triton.jit
def _gradient(off, factor, chosen_by):
    """Of the normalised tokens: each token's own pair, less the pairs of those whose neighbour it is."""
    pair = factor[:, None] * off
    return pair - dot(chosen_by, pair)


@triton.jit
def _backward_kernel(
    grad_loss_ptr,
    x_ptr,
    index_ptr,
    distance_ptr,
    norm_ptr,
    grad_x_ptr,
    x_stride_n,
    x_stride_k,
    min_distance,
    weight,  # of a token in the mean
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    x_ptr += image * x_stride_n
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    valid = k < K
    nearest = tl.load(index_ptr + image * K + k, mask=valid, other=0)
    distance = tl.load(distance_ptr + image * K + k, mask=valid, other=0.0)
    norm = tl.load(norm_ptr + image * K + k, mask=valid, other=1.0)
    nearest_norm = tl.load(norm_ptr + image * K + nearest, mask=valid, other=1.0)
    counts = valid & ((distance < min_distance) == 0) & (distance != 0.0)
    factor = -0.5 * weight * tl.load(grad_loss_ptr) / (0.5 * distance + EPS) / tl.where(counts, distance, 1.0)
    factor = tl.where(counts, factor, 0.0)
    # Row k has ones in the columns of tokens whose neighbour is k: every token gathers, no two write to one place.
    chosen_by = ((k[:, None] == nearest[None, :]) & valid[None, :]).to(tl.float32)
    along = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        own, off = _difference(x_ptr, x_stride_k, nearest, norm, nearest_norm, start, K, D, BLOCK_K, BLOCK_D)
        along += own * _gradient(off, factor, chosen_by)
    # a clamped norm has no gradient
    along_k = tl.where(norm == EPS, 0.0, tl.sum(along, 1))
    for start in range(0, D, BLOCK_D):
        own, off = _difference(x_ptr, x_stride_k, nearest, norm, nearest_norm, start, K, D, BLOCK_K, BLOCK_D)
        grad = (_gradient(off, factor, chosen_by) - own * along_k[:, None]) / norm[:, None]
        mask = valid[:, None] & (start + d < D)[None, :]
        tl.store(grad_x_ptr + (image * K + k[:, None]) * D + start + d[None, :], grad, mask=mask)


def launch_koleo_fwd(x: Tensor, min_distance: float, config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, index, distance, norm). The last dimension of x is contiguous."""
    (N, K, D), tile = x.shape, config.forward
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    index = torch.empty(N, K, dtype=torch.int64, device=x.device)
    distance, norm = (torch.empty(N, K, dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        _forward_kernel,
        (N,),
        x,
        losses,
        index,
        distance,
        norm,
        *x.stride()[:2],
        min_distance,
        K=K,
        D=D,
        BLOCK_K=dot_size(K),
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return losses.mean(), index, distance, norm


def launch_koleo_bwd(
    grad_loss: Tensor,
    x: Tensor,
    index: Tensor,
    distance: Tensor,
    norm: Tensor,
    min_distance: float,
    config: Config,
) -> Tensor:
    """Return grad_x, contiguous, in x's dtype."""
    (N, K, D), tile = x.shape, config.backward
    grad_x = torch.empty(N, K, D, dtype=x.dtype, device=x.device)
    launch(
        _backward_kernel,
        (N,),
        grad_loss,
        x,
        index,
        distance,
        norm,
        grad_x,
        *x.stride()[:2],
        min_distance,
        1 / (N * K),
        K=K,
        D=D,
        BLOCK_K=dot_size(K),
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return grad_x


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: both directions."""
    x = torch.empty(*(shape[letter] for letter in "NKD"), dtype=dtype, device="meta")
    loss, index, distance, norm = launch_koleo_fwd(x, 0.0, config)
    launch_koleo_bwd(loss, x, index, distance, norm, 0.0, config)
