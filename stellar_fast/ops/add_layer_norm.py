"""add_layer_norm: the sum that a residual stream takes, and its LayerNorm, in one pass. R rows, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.add_layer_norm import reference
from stellar_fast.ops.checks import (
    check_devices,
    check_floating,
    check_positive,
    in_forward_mode,
    surely,
    with_dense_rows,
)
from stellar_fast.tune.lookup import knobs, threads

# Below this many elements the dispatch of a registered operator costs more than one pass over memory saves: it is
# some 90 us forward and backward, as much as torch's own bf16 operators take for 10^5 elements on 2 cores of a Zen 5.
SMALL = 1 << 18
DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "add_layer_norm"


# All backends return (total, normed, mean, rstd): total (R, D), or (0,) without a residual, where it is x; mean and
# rstd (R,) fp32 are what the backward keeps beside total.
@torch.library.custom_op("stellar_fast::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.add_layer_norm import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(x), dtype, x.device)
        return kernel.launch_add_layer_norm_fwd(x, residual, weight, bias, eps, dtype, chosen)
    total, normed, mean, rstd = outputs = _empty_outputs(x, residual, dtype)
    weight, bias = _floats(weight), _floats(bias)
    native.module().add_layer_norm_forward(
        *x.shape,
        _rows(x),
        _rows(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        total.data_ptr(),
        _rows(normed),
        mean.data_ptr(),
        rstd.data_ptr(),
        threads(_OPERATOR, _sizes(x), dtype).forward,
    )
    return outputs


@_forward.register_fake
def _(x, residual, weight, bias, eps, dtype, name):
    return _empty_outputs(x, residual, dtype)


# Returns (grad_total_in, grad_x, grad_weight, grad_bias). grad_x is grad_total_in in x's dtype where that differs, else
# of shape (0,).
@torch.library.custom_op("stellar_fast::add_layer_norm_backward", mutates_args=())
def _backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    grad_normed = with_dense_rows(grad_normed)
    grad_total = None if grad_total is None else with_dense_rows(grad_total)
    if name == "triton":
        from stellar_fast.kernels.add_layer_norm import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(total), grad_normed.dtype, total.device)
        grad, grad_x, grad_weight, grad_bias = kernel.launch_add_layer_norm_bwd(
            grad_normed, grad_total, total, weight, mean, rstd, x_dtype, chosen
        )
        return grad, grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    dtype, weight = weight.dtype, _floats(weight)
    grad, grad_x, grad_weight, grad_bias = _empty_grads(total, weight, x_dtype)
    native.module().add_layer_norm_backward(
        *total.shape,
        _rows(grad_normed),
        _rows(grad_total),
        _rows(total),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad.data_ptr(),
        grad_x.data_ptr() if grad_x.numel() else 0,
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        threads(_OPERATOR, _sizes(total), grad_normed.dtype).backward,
    )
    return grad, grad_x, grad_weight.to(dtype), grad_bias.to(dtype)


@_backward.register_fake
def _(grad_normed, grad_total, total, weight, mean, rstd, x_dtype, name):
    return _empty_grads(total, weight, x_dtype)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, _, _, _, ctx.name = inputs
    total, _, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.dtypes = x.dtype, residual.dtype if ctx.has_residual else None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)
    through_total = ctx.has_residual and any(ctx.needs_input_grad[:2])
    ctx.mark_non_differentiable(mean, rstd, *(() if through_total else (total,)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_total: Tensor | None, grad_normed: Tensor | None, *_):
    x_dtype, residual_dtype = ctx.dtypes
    grad_weight = grad_bias = None
    if grad_normed is None:  # through the sum alone
        backend.ran(_OPERATOR, ctx.name)
        grad, grad_x = grad_total, None
    else:
        total, weight, mean, rstd = ctx.saved_tensors
        grad, grad_x, grad_weight, grad_bias = _backward(
            grad_normed, grad_total, total, weight, mean, rstd, x_dtype, ctx.name
        )
    if grad is None:
        return (None,) * 7
    if grad_x is None or grad.dtype == x_dtype:
        grad_x = grad.to(x_dtype)
    grad_residual = grad.to(residual_dtype) if ctx.has_residual else None
    return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = residual + x`` and ``normed = LayerNorm(total)``.

    Args:
        x: (..., D) floating, what a branch adds to the stream.
        residual: the stream, of the same shape; None takes x itself as the total.
        weight, bias: (D,) floating.
        eps: added to the variance.
        dtype: of `normed`; by default that of the total. Under autocast the dtype of the next product saves its cast.

    Returns:
        total (..., D) in the dtype that `residual + x` has, x itself without a residual; normed (..., D). Both have
        gradients. Mean and variance are computed in fp32 whatever the dtypes, under autocast too.
        Backends: `triton` (fp32, bf16, fp16), `cpu` (fp32, bf16, mixed as they come; small tensors only when
        asked for), `torch` (add, then
        `torch.nn.functional.layer_norm`), `reference` (fp32). The first two have no second derivative.

    Raises:
        ValueError: shapes or devices that differ, a width of zero, integer tensors, an eps that is not positive.
    """
    D = x.shape[-1] if x.dim() else 0
    check_positive(D=D, eps=eps)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but residual has {tuple(residual.shape)}")
    if weight.shape != (D,) or bias.shape != (D,):
        raise ValueError(
            f"weight and bias must have shape ({D},) but have {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    tensors = {"x": x, "weight": weight, "bias": bias} | ({} if residual is None else {"residual": residual})
    check_devices(**tensors)
    check_floating(**tensors)
    total_dtype = x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)
    dtype = dtype or total_dtype
    name = backend.pick(_OPERATOR, x.device.type, _unfit((*(t.dtype for t in tensors.values()), dtype), x.numel()))
    if name == "reference":
        total, normed = reference.add_layer_norm(x, residual, weight, bias, eps)
        return total.to(total_dtype), normed.to(dtype)
    if name == "torch":
        return _torch(x, residual, weight, bias, eps, dtype)
    rows = with_dense_rows(x.reshape(-1, D))
    stream = None if residual is None else with_dense_rows(residual.reshape(-1, D))
    total, normed, _, _ = _forward(rows, stream, weight, bias, eps, dtype, name)
    return x if residual is None else total.view(x.shape), normed.view(x.shape)


def _torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    if total.dtype == weight.dtype == bias.dtype:
        normed = F.layer_norm(total, weight.shape, weight, bias, eps)
    else:
        wide = torch.promote_types(total.dtype, torch.float32)
        normed = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, normed.to(dtype)


def _unfit(dtypes: tuple[torch.dtype, ...], elements: int) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, or should not where nothing was asked for, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in DTYPES)
    unfit = [
        (n, f"it does not compute in {dtype}") for n, taken in DTYPES.items() for dtype in dtypes if dtype not in taken
    ]
    if surely(elements < SMALL) and backend.requested(_OPERATOR) is None:
        unfit.append(("cpu", "the tensors are small"))
    return tuple(unfit)


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _sizes(x: Tensor) -> dict[str, int]:
    return {"R": x.shape[0], "D": x.shape[1]}


def _rows(x: Tensor | None) -> tuple[int, bool, int]:
    return (0, False, 0) if x is None else (x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0))


def _empty_outputs(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if residual is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, x.dtype))
    mean, rstd = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(x.shape, dtype=dtype), mean, rstd


def _empty_grads(total: Tensor, weight: Tensor, x_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = total.new_empty(total.shape)
    grad_x = total.new_empty(0 if x_dtype == total.dtype else total.shape, dtype=x_dtype)
    return grad, grad_x, torch.empty_like(weight), torch.empty_like(weight)
