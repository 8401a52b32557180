"""add_layer_norm in Triton: every element read once and written once, each way. R rows, D width.

A program holds whole rows in registers. D is compiled in (a model has one or two), R is not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.add_layer_norm.config import Config, padded_width
from stellar_fast.kernels.common.launch import launch
from stellar_fast.registry import Shape


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    x_ptr,
    residual_ptr,  # None without
    weight_ptr,
    bias_ptr,
    total_ptr,  # None without a residual
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    eps,
    R,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    row_mask, d_mask = row < R, d < D
    mask = row_mask[:, None] & d_mask[None, :]
    total = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row[:, None] * residual_stride + d[None, :], mask=mask, other=0.0)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * D + d[None, :], rounded, mask=mask)
        total = rounded.to(tl.float32)  # the norm is that of the total as others read it, the backward too
    mean = tl.sum(total, 1) / D
    centred = tl.where(d_mask[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + row[:, None] * D + d[None, :], normed, mask=mask)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    grad_normed_ptr,
    grad_total_ptr,  # None without
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_ptr,
    grad_x_ptr,  # None where x has the dtype of the total
    weight_sums_ptr,  # (programs, D), as bias_sums
    bias_sums_ptr,
    grad_normed_stride,
    grad_total_stride,
    total_stride,
    R,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    weight = tl.load(weight_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
    # summed over rows only at the end: until then every warp has its own
    weight_sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    bias_sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first_row = program * BLOCK_R
    while first_row < R:
        row = first_row + tl.arange(0, BLOCK_R)
        row_mask = row < R
        mask = row_mask[:, None] & d_mask[None, :]
        grad_normed = tl.load(grad_normed_ptr + row[:, None] * grad_normed_stride + d[None, :], mask=mask, other=0.0)
        total = tl.load(total_ptr + row[:, None] * total_stride + d[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        grad_normed = grad_normed.to(tl.float32)
        normalised = tl.where(mask, (total.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        weight_sums += grad_normed * normalised
        bias_sums += grad_normed
        grad = grad_normed * weight[None, :]
        along, across = tl.sum(grad * normalised, 1) / D, tl.sum(grad, 1) / D
        grad = (grad - across[:, None] - normalised * along[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            grad += tl.load(grad_total_ptr + row[:, None] * grad_total_stride + d[None, :], mask=mask, other=0.0)
        tl.store(grad_ptr + row[:, None] * D + d[None, :], grad, mask=mask)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + row[:, None] * D + d[None, :], grad, mask=mask)
        first_row += programs * BLOCK_R
    tl.store(weight_sums_ptr + program * D + d, tl.sum(weight_sums, 0), mask=d_mask)
    tl.store(bias_sums_ptr + program * D + d, tl.sum(bias_sums, 0), mask=d_mask)


def launch_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (total or (0,) without a residual, normed, mean, rstd). Rows may be strided, their elements not."""
    (R, D), tile = x.shape, config.forward
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(R, D, dtype=torch.promote_types(residual.dtype, x.dtype))
    normed = x.new_empty(R, D, dtype=out_dtype)
    mean, rstd = (x.new_empty(R, dtype=torch.float32) for _ in range(2))
    launch(
        _forward_kernel,
        (triton.cdiv(R, tile.block_r),),
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        None if residual is None else total,
        normed,
        mean,
        rstd,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        R,
        D=D,
        BLOCK_R=tile.block_r,
        BLOCK_D=padded_width(D),
        num_warps=tile.num_warps,
    )
    return total, normed, mean, rstd


def launch_add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (grad of the total, the same in x's dtype or (0,) where that is the total's, grad_weight, grad_bias).

    The last two are fp32, summed in two stages and so in the same order every time.
    """
    (R, D), tile = total.shape, config.backward
    grad = total.new_empty(R, D)
    grad_x = total.new_empty((R, D) if x_dtype != total.dtype else 0, dtype=x_dtype)
    programs = min(triton.cdiv(R, tile.block_r), config.programs)
    weight_sums, bias_sums = (total.new_empty(programs, D, dtype=torch.float32) for _ in range(2))
    launch(
        _backward_kernel,
        (programs,),
        grad_normed,
        grad_total,
        total,
        weight.contiguous(),
        mean,
        rstd,
        grad,
        grad_x if x_dtype != total.dtype else None,
        weight_sums,
        bias_sums,
        grad_normed.stride(0),
        0 if grad_total is None else grad_total.stride(0),
        total.stride(0),
        R,
        D=D,
        BLOCK_R=tile.block_r,
        BLOCK_D=padded_width(D),
        num_warps=tile.num_warps,
    )
    return grad, grad_x, weight_sums.sum(0), bias_sums.sum(0)


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: under autocast and without, with a residual and without."""
    R, D = shape["R"], shape["D"]

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    for stream, residual in ((torch.float32, True), (dtype, True), (dtype, False)):
        x, weight = new(R, D, dtype=dtype), new(D, dtype=stream)
        given = new(R, D, dtype=stream) if residual else None
        total, normed, mean, rstd = launch_add_layer_norm_fwd(x, given, weight, weight, 1e-6, dtype, config)
        total = total if residual else x
        launch_add_layer_norm_bwd(normed, total if residual else None, total, weight, mean, rstd, dtype, config)
