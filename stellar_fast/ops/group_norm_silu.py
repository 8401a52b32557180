"""group_norm_silu: GroupNorm and SiLU of images. B images, C channels, H x W pixels, channels-last in memory."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.precision import without_autocast
from stellar_fast.kernels.group_norm_silu import reference
from stellar_fast.ops.checks import (
    channels_last,
    check_devices,
    check_floating,
    check_out,
    check_positive,
    check_shapes,
    in_forward_mode,
    is_looked_on,
    may_skip_dispatch,
)
from stellar_fast.tune.lookup import threads

DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),  # in the order of csrc/common/launch.h
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "group_norm_silu"


# All backends return (out, y, stats): y (0,) without a residual, where it is x; stats (0,) where they were given. The
# backward reads y, or x, and the statistics.
@torch.library.custom_op("stellar_fast::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(x, residual, groups, stats)
    _compute(x, residual, groups, weight, bias, eps, stats, name, *outputs)
    return outputs


def _compute(
    x: Tensor,
    residual: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: Tensor | None,
    name: str,
    out: Tensor,
    y: Tensor,
    found: Tensor,
) -> None:
    backend.ran(_OPERATOR, name)
    x, weight, bias = channels_last(x), _floats(weight), _floats(bias)
    residual = None if residual is None else channels_last(residual)
    kept = found if stats is None else stats.contiguous()
    addresses = (_address(residual), y.data_ptr(), kept.data_ptr(), stats is not None, out.data_ptr())
    norm = _norm(x, groups, weight, bias, eps)
    if name == "cuda":
        launch, dtype, workspace = _launch(x, norm)
        native.module().group_norm_silu_forward_cuda(
            *launch, norm, x.data_ptr(), *addresses, dtype, workspace.data_ptr()
        )
    else:
        bf16 = x.dtype == torch.bfloat16
        native.module().group_norm_silu_forward(
            norm, x.data_ptr(), *addresses, bf16, threads(_OPERATOR, _sizes(x), x.dtype).forward
        )


@_forward.register_fake
def _(x, residual, groups, weight, bias, eps, stats, name):
    return _empty_outputs(x, residual, groups, stats)


# Returns (grad, grad_weight, grad_bias): that of the sum, which x and the residual both have, and two in fp32.
@torch.library.custom_op("stellar_fast::group_norm_silu_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_y: Tensor | None,
    y: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: Tensor,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    grad, grad_weight, grad_bias = grads = _empty_grads(y, weight)
    y, grad_out, stats = channels_last(y), channels_last(grad_out), stats.contiguous()
    grad_y = None if grad_y is None else channels_last(grad_y)
    wide_weight, wide_bias = _floats(weight), _floats(bias)
    addresses = [_address(t) for t in (stats, grad_out, grad_y, y, grad, grad_weight, grad_bias)]
    norm = _norm(y, groups, wide_weight, wide_bias, eps)
    if name == "cuda":
        launch, dtype, workspace = _launch(y, norm)
        native.module().group_norm_silu_backward_cuda(*launch, norm, *addresses, dtype, workspace.data_ptr())
    else:
        bf16 = y.dtype == torch.bfloat16
        native.module().group_norm_silu_backward(
            norm, *addresses, bf16, threads(_OPERATOR, _sizes(y), y.dtype).backward
        )
    return grads


@_backward.register_fake
def _(grad_out, grad_y, y, groups, weight, bias, eps, stats, name):
    return _empty_grads(y, weight)


def _save(ctx, inputs, output) -> None:
    x, residual, ctx.groups, weight, bias, ctx.eps, stats, ctx.name = inputs
    _, y, found = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(y if ctx.has_residual else x, weight, bias, found if stats is None else stats)
    through_y = ctx.has_residual and any(ctx.needs_input_grad[:2])
    ctx.mark_non_differentiable(found, *(() if through_y else (y,)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Tensor | None, grad_y: Tensor | None, *_):
    grad_weight = grad_bias = None
    if grad_out is None:  # through the sum alone
        backend.ran(_OPERATOR, ctx.name)
        grad = grad_y
    else:
        y, weight, bias, stats = ctx.saved_tensors
        grad, grad_weight, grad_bias = _backward(
            grad_out, grad_y, y, ctx.groups, weight, bias, ctx.eps, stats, ctx.name
        )
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    return grad, grad if ctx.has_residual else None, None, grad_weight, grad_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@overload
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    stats: Tensor | None = ...,
    *,
    residual: None = ...,
    out: Tensor | None = ...,
) -> Tensor: ...
@overload
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    stats: Tensor | None = ...,
    *,
    residual: Tensor,
    out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    stats: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``silu(group_norm(x))``, or with a residual that of ``y = x + residual``, and y.

    Args:
        x: (B, C, H, W) floating; channels-last memory is taken as it is, another layout is copied.
        groups: of channels, a divisor of C.
        weight, bias: (C,) floating, of any dtype.
        eps: added to the variance.
        stats: (B, groups, 2) fp32 (or fp64 with x), mean and biased variance of x's groups, where they are known: one
            pass over x is then enough. They are believed, and gradients reach x as if they had been computed here.
        residual: of x's shape. The sum is written once, in the dtype that ``x + residual`` has, and normalised as it
            was rounded.
        out: channels-last memory of x's shape and dtype for the result, where no gradient is kept.

    Returns:
        out (B, C, H, W), channels-last, in x's dtype (with a residual: the sum's), under autocast too, where torch's
        GroupNorm would widen it to fp32: inside, all is fp32 anyway, and the next convolution takes 16 bits. With a
        residual (out, y), both with gradients.
        Backends: `cuda` (fp32, bf16, fp16), `cpu` (fp32, bf16), `torch`
        (`torch.group_norm`, `torch.nn.functional.silu`), `reference` (fp32). The last two compute the statistics in
        any case; the first two have no second derivative, and give NaN where squares leave fp32 (values over 1e17).

    Raises:
        ValueError: groups that do not divide C, shapes or devices that differ, integer tensors, an eps that is not
            positive, stats that are not fp32 or come with a residual, an `out` that does not fit, overlaps an input
            or whose inputs need a gradient.

    Source: "Group Normalization" (arXiv 1803.08494); SiLU: "Gaussian Error Linear Units" (arXiv 1606.08415).
    """
    C = check_shapes(x=(x, "BCHW"))["C"]
    check_positive(C=C, groups=groups, eps=eps)
    if C % groups:
        raise ValueError(f"groups must divide the channels, but {groups} does not divide {C}")
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"weight and bias must have shape ({C},) but have {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    tensors = {"x": x, "weight": weight, "bias": bias}
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"x has shape {tuple(x.shape)} but residual has {tuple(residual.shape)}")
        if stats is not None:
            raise ValueError("stats are those of x, but with a residual it is x + residual that is normalised")
        tensors["residual"] = residual
    if stats is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        if stats.shape != (x.shape[0], groups, 2) or stats.dtype not in (torch.float32, wide):
            raise ValueError(
                f"stats must be torch.float32 of shape {(x.shape[0], groups, 2)} but are {stats.dtype} of shape "
                f"{tuple(stats.shape)}"
            )
        tensors["stats"] = stats
    check_devices(**tensors)
    check_floating(**tensors)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if out is not None:
        check_out(out, x.shape, dtype, tensors)
    name = backend.pick(_OPERATOR, x.device.type, _unfit(dtype, weight.dtype, bias.dtype))
    if name in DTYPES:
        x = channels_last(x.to(dtype))
        residual = None if residual is None else channels_last(residual.to(dtype))
        arguments = x, residual, groups, weight, bias, eps, None if stats is None else stats.detach(), name
        inputs = x, residual, weight, bias, stats
        if may_skip_dispatch(*inputs) if out is None else not is_looked_on(*inputs, out):
            given = out is not None
            out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
            y, found = _empty_beside(out, residual, groups, stats)
            _compute(*arguments, out, y, found)
            if given and not out.is_inference():
                torch.autograd.graph.increment_version(out)
        else:
            image, y, _ = _forward(*arguments)
            out = image if out is None else out.copy_(image)
        return out if residual is None else (out, y)
    if name == "reference":
        result = reference.group_norm_silu(x, groups, weight, bias, eps, stats, residual)
    else:
        result = _torch(x.to(dtype), groups, weight, bias, eps, None if residual is None else residual.to(dtype))
    image, *sums = (result,) if isinstance(result, Tensor) else result
    image = channels_last(image.to(dtype)) if out is None else out.copy_(image)
    return (image, channels_last(sums[0].to(dtype))) if sums else image


def _torch(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    x = channels_last(x)
    y = x if residual is None else x + channels_last(residual)
    frozen = torch.is_grad_enabled() and not y.requires_grad and (weight.requires_grad or bias.requires_grad)
    # torch 2.13's backward crashes where a channels-last tensor on a CPU needs no gradient but its weight does
    given = y.contiguous() if frozen and y.device.type == "cpu" else y
    # the functional form would refuse an image of one value a group
    with without_autocast(x):
        wide = torch.promote_types(torch.promote_types(y.dtype, weight.dtype), bias.dtype)
        out = F.silu(torch.group_norm(given.to(wide), groups, weight.to(wide), bias.to(wide), eps))
    return out if residual is None else (out, y)


def _unfit(dtype: torch.dtype, weight: torch.dtype, bias: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        # torch's cannot differentiate a channels-last tensor forwards
        return tuple((name, "it has no forward-mode derivative") for name in (*DTYPES, "torch"))
    unfit = [(name, f"it does not compute in {dtype}") for name, taken in DTYPES.items() if dtype not in taken]
    if torch.float64 in (weight, bias):
        unfit += [(name, "it does not compute in torch.float64") for name in DTYPES]
    return tuple(unfit)


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[int, int, int, int, int, int, float]:
    B, C, H, W = x.shape
    return B, H * W, C, groups, weight.data_ptr(), bias.data_ptr(), eps


def _sizes(x: Tensor) -> dict[str, int]:
    return dict(zip("BCHW", x.shape, strict=True))


def _launch(x: Tensor, norm: tuple[int, int, int, int, int, int, float]) -> tuple[tuple[int, int], int, Tensor]:
    """Device and stream, the dtype as CUDA C++ knows it, and memory for sums."""
    workspace = x.new_empty(native.module().group_norm_silu_workspace_cuda(norm), dtype=torch.float32)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return (x.device.index, stream), DTYPES["cuda"].index(x.dtype), workspace


def _empty_outputs(
    x: Tensor, residual: Tensor | None, groups: int, stats: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, *_empty_beside(out, residual, groups, stats)


def _empty_beside(out: Tensor, residual: Tensor | None, groups: int, stats: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum and the statistics, of shape (0,) where there are none to compute."""
    y = out.new_empty(0) if residual is None else torch.empty_like(out)
    return y, out.new_empty((out.shape[0], groups, 2) if stats is None else 0, dtype=torch.float32)


def _empty_grads(y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(y, memory_format=torch.channels_last)
    grad_weight, grad_bias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return grad, grad_weight, grad_bias
