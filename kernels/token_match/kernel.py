"""token_match in Triton: a program takes one view of an image, reads its tokens once and keeps the K x K problem.

Shapes: B images, V views, K tokens of width D. K and D are compiled in (a model has one of each), B and V are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.token_match.config import Config, padded_tokens
from stellar_fast.registry import Shape


@triton.jit
def _distances(
    pred_ptr,
    target_ptr,
    pred_stride_b,
    pred_stride_v,
    pred_stride_k,
    target_stride_b,
    target_stride_k,
    V,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """This program's distances (BLOCK_K, BLOCK_K) between predictions and targets; rows that pad are zero vectors."""
    problem = tl.program_id(0).to(tl.int64)
    pred_ptr += problem // V * pred_stride_b + problem % V * pred_stride_v
    target_ptr += problem // V * target_stride_b
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    # summed over a slice's elements only at the end: until then every thread has its own
    squares = tl.zeros((BLOCK_K, BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = (k < K)[:, None] & (start + d < D)[None, :]
        pred = tl.load(pred_ptr + k[:, None] * pred_stride_k + start + d[None, :], mask=mask, other=0.0)
        target = tl.load(target_ptr + k[:, None] * target_stride_k + start + d[None, :], mask=mask, other=0.0)
        difference = pred.to(tl.float32)[:, None, :] - target.to(tl.float32)[None, :, :]
        squares += difference * difference
    return tl.sqrt_rn(tl.sum(squares, 2))


@triton.jit(do_not_specialize=["V"])
def _largest_kernel(
    pred_ptr,
    target_ptr,
    largest_ptr,  # zero at first
    pred_stride_b,
    pred_stride_v,
    pred_stride_k,
    target_stride_b,
    target_stride_k,
    V,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cost = _distances(
        pred_ptr,
        target_ptr,
        pred_stride_b,
        pred_stride_v,
        pred_stride_k,
        target_stride_b,
        target_stride_k,
        V,
        K,
        D,
        BLOCK_K,
        BLOCK_D,
    )
    valid = tl.arange(0, BLOCK_K) < K
    cost = tl.where(valid[:, None] & valid[None, :], cost, 0.0)
    tl.atomic_max(largest_ptr, tl.max(tl.max(cost, 1), 0))  # the same in any order


@triton.jit(do_not_specialize=["V"])
def _match_kernel(
    pred_ptr,
    target_ptr,
    keep_ptr,  # None without a filter, as largest
    largest_ptr,
    index_ptr,
    plan_ptr,  # None where it is not asked for
    pred_stride_b,
    pred_stride_v,
    pred_stride_k,
    target_stride_b,
    target_stride_k,
    epsilon,
    V,
    K: tl.constexpr,
    D: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    is_pred, is_target = (k < K)[:, None], (k < K)[None, :]
    cost = _distances(
        pred_ptr,
        target_ptr,
        pred_stride_b,
        pred_stride_v,
        pred_stride_k,
        target_stride_b,
        target_stride_k,
        V,
        K,
        D,
        BLOCK_K,
        BLOCK_D,
    )
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + problem // V * K + k, mask=k < K, other=1)
        cost = tl.where((keep != 0)[None, :], cost, 2 * tl.load(largest_ptr))
    cost = cost / epsilon
    v = tl.zeros((BLOCK_K,), tl.float32)
    u = tl.zeros((BLOCK_K,), tl.float32)
    for _ in range(ITERATIONS):
        score = tl.where(is_target, v[None, :] - cost, float("-inf"))
        best = tl.max(score, 1)
        u = -(best + tl.log(tl.sum(tl.exp(score - best[:, None]), 1)))
        score = tl.where(is_pred, u[:, None] - cost, float("-inf"))
        best = tl.max(score, 0)
        v = -(best + tl.log(tl.sum(tl.exp(score - best[None, :]), 0)))
    # the largest of a row of the plan, found before its exponential rounds; a NaN is never the largest
    score = v[None, :] - cost
    score = tl.where(is_target & (score == score), score, float("-inf"))
    tl.store(index_ptr + problem * K + k, tl.argmax(score, 1).to(tl.int64), mask=k < K)
    if plan_ptr is not None:
        plan = tl.exp(u[:, None] + v[None, :] - cost)
        tl.store(plan_ptr + (problem * K + k[:, None]) * K + k[None, :], plan, mask=is_pred & is_target)


def launch_token_match_fwd(
    pred: Tensor,
    target: Tensor,
    keep: Tensor | None,
    epsilon: float,
    iterations: int,
    return_plan: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Return (index, plan or (0,)). The last dimension of the tokens is contiguous; `keep` is contiguous uint8."""
    B, V, K, D = pred.shape
    index = torch.empty(B, V, K, dtype=torch.int64, device=pred.device)
    plan = torch.empty((B, V, K, K) if return_plan else (0,), dtype=torch.float32, device=pred.device)
    strides = *pred.stride()[:3], *target.stride()[:2]
    knobs = {"K": K, "D": D, "BLOCK_K": padded_tokens(K), "BLOCK_D": config.block_d, "num_warps": config.num_warps}
    largest = None
    if keep is not None:
        largest = torch.zeros(1, dtype=torch.float32, device=pred.device)
        launch(_largest_kernel, (B * V,), pred, target, largest, *strides, V, **knobs)
    launch(
        _match_kernel,
        (B * V,),
        pred,
        target,
        keep,
        largest,
        index,
        plan if return_plan else None,
        *strides,
        epsilon,
        V,
        ITERATIONS=iterations,
        **knobs,
    )
    return index, plan


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: as in a training step, and with a filter and the plan."""
    B, V, K, D = (shape[letter] for letter in "BVKD")
    pred, target = (torch.empty(*size, dtype=dtype, device="meta") for size in ((B, V, K, D), (B, K, D)))
    keep = torch.empty(B, K, dtype=torch.uint8, device="meta")
    launch_token_match_fwd(pred, target, None, 0.1, 5, False, config)
    launch_token_match_fwd(pred, target, keep, 0.1, 5, True, config)
