"""conv3x3: a 3x3 "same" convolution. B images, C input, O output channels, H x W pixels, channels-last in memory."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.conv3x3 import reference
from stellar_fast.ops.checks import (
    autocast_dtype,
    channels_last,
    check_floating,
    check_out,
    check_shapes,
    in_forward_mode,
    is_looked_on,
    surely,
)
from stellar_fast.ops.scratch import scratch
from stellar_fast.tune.lookup import threads

# Where the kernel gains on 2 cores of a Zen 5, over oneDNN with weights laid out once: the share of the transforms is
# that of 1 / channels (16: 0.9x, 32: 1.2x at 64x64 pixels), and a side of 1 or 2 wastes half of a tile. The taps are
# transformed for a few pixels as for many: of 512 channels at 16x16 pixels 0.76x (0.96x of torch's own call), two such
# images 0.99x, 256 channels at 32x32 1.4x. It takes the first of these all the same: the weights laid out of the
# VQGAN's 512-channel layers are 9 MiB each, which would stay, for 4 % of a decoding.
MIN_CHANNELS, MIN_PRODUCTS, MIN_PIXELS, MIN_SIDE = 32, 1 << 21, 256, 8
COLUMNS = 16  # kConvColumns of csrc/conv3x3
_OPERATOR = "conv3x3"


# Returns (out, stats), stats of shape (B, 0, 2) where groups is 0.
@torch.library.custom_op("stellar_fast::conv3x3", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int, name: str
) -> tuple[Tensor, Tensor]:
    out, stats = outputs = _empty_outputs(x, weight, groups)
    _compute(x, weight, bias, residual, groups, name, out, stats)
    return outputs


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    name: str,
    out: Tensor,
    stats: Tensor,
) -> None:
    backend.ran(_OPERATOR, name)
    if not len(x):
        return
    x = channels_last(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    weight = channels_last(weight)
    B, C, H, W = x.shape
    O = out.shape[1]  # noqa: E741
    panels = scratch((16 * C * (O + -O % COLUMNS),), x.dtype, "weights of conv3x3")
    native.module().conv3x3(
        (B, H, W, C, O),
        x.data_ptr(),
        weight.data_ptr(),
        panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        groups,
        stats.data_ptr(),
        threads(_OPERATOR, dict(zip("BCHWO", (*x.shape, out.shape[1]), strict=True)), x.dtype).forward,
    )


@_forward.register_fake
def _(x, weight, bias, residual, groups, name):
    return _empty_outputs(x, weight, groups)


# Returns (grad_x, grad_weight, grad_bias), of shape (0,) where `needs` does not ask for it.
@torch.library.custom_op("stellar_fast::conv3x3_backward", mutates_args=(), device_types="cpu")
def _backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], name: str) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    grads = _empty_grads(x, weight, needs)
    if not len(x):
        for empty in grads:
            empty.zero_()
        return grads
    grad, x = (channels_last(t) for t in (grad, x))
    sizes, ones = [weight.shape[0]] if needs[2] else None, [1, 1]
    found = torch.ops.aten.convolution_backward(grad, x, weight, sizes, ones, ones, ones, False, [0, 0], 1, needs)
    grad_x, grad_weight, grad_bias = (f if needed else g for f, g, needed in zip(found, grads, needs, strict=True))
    if needs[0]:
        grad_x = channels_last(grad_x)
    return grad_x, grad_weight.contiguous(), grad_bias


@_backward.register_fake
def _(grad, x, weight, needs, name):
    return _empty_grads(x, weight, needs)


def _save(ctx, inputs, output) -> None:
    x, weight, _, _, _, ctx.name = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 6
    *needs, needs_residual = ctx.needs_input_grad[:4]
    found: tuple[Tensor | None, ...] = (None,) * 3
    if any(needs):
        grads = _backward(grad, *ctx.saved_tensors, needs, ctx.name)
        found = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
    else:
        backend.ran(_OPERATOR, ctx.name)
    return *found, grad if needs_residual else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _empty_outputs(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    B, _, H, W = x.shape
    out = torch.empty((B, weight.shape[0], H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, x.new_empty(B, groups, 2, dtype=torch.float32)


def _empty_grads(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = needs
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


@overload
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stats_groups: None = None,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stats_groups: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``conv2d(x, weight, bias, padding=1) + residual``, in one pass over the output.

    Args:
        x: (B, C, H, W) floating; copied unless it is channels_last in memory.
        weight: (O, C, 3, 3) of the same dtype (any floating dtype under autocast, which rules). Copied
            unless it is channels_last in memory.
        bias: (O,).
        residual: (B, O, H, W) floating; the sum has the dtype that torch's has.
        stats_groups: of channels, for the GroupNorm that reads the result; divides O.
        out: channels-last memory for the result, where no gradient is kept; may be the residual, but not overlap x.

    Returns:
        (B, O, H, W), channels_last; with `stats_groups` also (B, groups, 2) fp32: mean and biased variance of each
        group over its channels and pixels, of the values as they are stored. They have no gradient of their own.
        Backends: `cpu` (fp32): 16 products for 4 pixels where the plain formula has 36, unasked where `pays` says so;
        no worse than torch at noise (0.6 of its error at 128 channels); `torch`; `reference` (fp32).

    Raises:
        ValueError: sizes that do not fit or are 0, dtypes that differ, groups that do not divide O, an `out` that does
            not fit or whose inputs need a gradient.
    """
    tensors = {"x": (x, "BCHW"), "weight": (weight, "OCmn")}
    tensors |= {} if bias is None else {"bias": (bias, "O")}
    tensors |= {} if residual is None else {"residual": (residual, "BOHW")}
    sizes = check_shapes(**tensors)
    named = {key: tensor for key, (tensor, _) in tensors.items()}
    check_floating(**named)
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must be (O, C, 3, 3) but has shape {tuple(weight.shape)}")
    if not all(sizes[letter] for letter in "COHW"):
        raise ValueError(f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} must not be empty")
    if stats_groups is not None and (stats_groups < 1 or sizes["O"] % stats_groups):
        raise ValueError(f"stats_groups must divide the {sizes['O']} output channels but is {stats_groups}")
    dtypes = {tensor.dtype for key, tensor in named.items() if key != "residual"}
    autocast = autocast_dtype(x.device)
    if autocast is not None and torch.float64 not in dtypes:
        dtypes = {autocast}
    result = dtypes if residual is None else {*dtypes, residual.dtype}
    name = backend.pick(_OPERATOR, x.device.type, _unfit(result))
    if len(dtypes) > 1:
        raise ValueError("x, weight and bias must have one dtype but have " + " and ".join(sorted(map(str, dtypes))))
    (dtype,) = dtypes
    if name == "cpu" and backend.requested(_OPERATOR) is None and not pays(x, weight):
        name = "torch"
    if out is not None:
        wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        check_out(out, (sizes["B"], sizes["O"], *x.shape[2:]), wide, named, may_be="residual")
    if name == "cpu":
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        arguments = x, weight, bias, residual, stats_groups or 0, name
        if out is None or is_looked_on(*named.values(), out):
            found, stats = _forward(*arguments)
            out = found if out is None else out.copy_(found)
        else:
            stats = out.new_empty(len(x), stats_groups or 0, 2)
            _compute(*arguments, out, stats)
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)
        return out if stats_groups is None else (out, stats)
    if name == "torch":
        found = F.conv2d(channels_last(x).to(dtype), weight, bias, padding=1)
        found = found if residual is None else found + residual
    else:
        wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        found = reference.conv3x3(x, weight, bias, residual).to(wide)
    out = channels_last(found) if out is None else out.copy_(found)
    return out if stats_groups is None else (out, statistics(out, stats_groups))


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether fewer products are worth their transforms, on a CPU in fp32."""
    (O, C), (H, W) = weight.shape[:2], x.shape[2:]  # noqa: E741
    pixels = len(x) * H * W
    enough = surely(pixels >= MIN_PIXELS) and surely(pixels * C * O >= MIN_PRODUCTS)
    return enough and min(C, O) >= MIN_CHANNELS and surely(H >= MIN_SIDE) and surely(W >= MIN_SIDE)


def _unfit(dtypes: set[torch.dtype]) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in ("cpu", "torch"))
    if dtypes != {torch.float32}:
        return (("cpu", f"it does not compute in {' and '.join(sorted(map(str, dtypes - {torch.float32})))}"),)
    return ()
