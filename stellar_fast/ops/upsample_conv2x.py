"""upsample_conv2x: nearest x2 and a 3x3 convolution. B images, C input, O output channels, H x W input pixels."""

import functools
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.upsample_conv2x import reference
from stellar_fast.kernels.upsample_conv2x.phases import (
    fold_phases,
    paired_product_weights,
    phase_weights,
    product_weights,
)
from stellar_fast.ops.checks import autocast_dtype, channels_last, check_floating, check_shapes, in_forward_mode
from stellar_fast.ops.from_weight import from_weight
from stellar_fast.tune.lookup import threads

DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),  # in the order of csrc/common/launch.h
    "cpu": (torch.float32, torch.bfloat16),
}
# Of the phases that are computed before they are interleaved on a CPU: few enough to stay in its last cache, and in
# memory that glibc reuses.
PHASES_BYTES = 24 * 2**20
_OPERATOR = "upsample_conv2x"


# Returns (out, stats), stats of shape (B, 0, 2) where groups is 0.
@torch.library.custom_op("stellar_fast::upsample_conv2x", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, name: str) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    out, stats = outputs = _empty_outputs(x, weight, groups)
    if not len(x):
        return outputs
    x = _dense(x)
    bias = None if bias is None else bias.float().contiguous()
    bias_address = 0 if bias is None else bias.data_ptr()
    if name == "cpu" and (x.dtype == torch.float32 or _multiplies_bf16()):
        half, count = x.dtype == torch.bfloat16, threads(_OPERATOR, _letters(x, out), x.dtype).forward
        weights = from_weight(paired_product_weights if half else product_weights, weight, x.dtype)
        native.module().upsample_conv2x_products(
            _sizes(out),
            x.data_ptr(),
            x.shape[1],
            weights.data_ptr(),
            bias_address,
            out.data_ptr(),
            groups,
            stats.data_ptr(),
            half,
            count,
        )
        return outputs
    taps = from_weight(phase_weights, weight, x.dtype)
    if name == "cuda":
        phases = _dense(F.conv2d(x, taps, padding=1))
        scratch = x.new_empty((len(x), _chunks(out), out.shape[1], 2) if groups else 0, dtype=torch.float32)
        native.module().upsample_conv2x_interleave_cuda(
            *_stream(x),
            _sizes(out),
            phases.data_ptr(),
            bias_address,
            out.data_ptr(),
            groups,
            stats.data_ptr(),
            scratch.data_ptr(),
            DTYPES["cuda"].index(x.dtype),
        )
        return outputs
    count = max(1, PHASES_BYTES // (out[0].numel() * out.element_size()))
    for some, to, to_stats in zip(*(t.split(count) for t in (x, out, stats)), strict=True):
        phases = _dense(F.conv2d(some, taps, padding=1))
        native.module().upsample_conv2x_interleave(
            _sizes(to),
            phases.data_ptr(),
            bias_address,
            to.data_ptr(),
            groups,
            to_stats.data_ptr(),
            x.dtype == torch.bfloat16,
            threads(_OPERATOR, _letters(x, out), x.dtype).forward,
        )
    return outputs


@_forward.register_fake
def _(x, weight, bias, groups, name):
    return _empty_outputs(x, weight, groups)


# Returns (grad_x, grad_weight, grad_bias), the last in fp32; of shape (0,) where `needs` does not ask for it.
@torch.library.custom_op("stellar_fast::upsample_conv2x_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], name: str) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    needs_x, needs_weight, needs_bias = needs
    grad_x, grad_weight, grad_bias = _empty_grads(x, weight, needs)
    if not len(x):
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    x, grad = _dense(x), _dense(grad)
    B, O, H, W = grad.shape  # noqa: E741
    phases = _empty(grad, 4 * O, H // 2 + 1, W // 2 + 1)
    if name == "cuda":
        sums = grad.new_empty(B * _chunks(grad), O, dtype=torch.float32)
        native.module().upsample_conv2x_split_cuda(
            *_stream(grad),
            _sizes(grad),
            grad.data_ptr(),
            phases.data_ptr(),
            sums.data_ptr(),
            DTYPES["cuda"].index(grad.dtype),
        )
        sums = sums.sum(0)
    else:
        sums = grad.new_empty(O, dtype=torch.float32)
        native.module().upsample_conv2x_split(
            _sizes(grad),
            grad.data_ptr(),
            phases.data_ptr(),
            sums.data_ptr(),
            grad.dtype == torch.bfloat16,
            threads(_OPERATOR, _letters(x, grad), grad.dtype).backward,
        )
    if needs_bias:
        grad_bias = sums
    if needs_x or needs_weight:
        of_x, of_taps, _ = torch.ops.aten.convolution_backward(
            phases,
            x,
            from_weight(phase_weights, weight, x.dtype),
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [needs_x, needs_weight, False],
        )
        grad_x = channels_last(of_x) if needs_x else grad_x
        grad_weight = fold_phases(of_taps.float()).to(weight.dtype) if needs_weight else grad_weight
    return grad_x, grad_weight, grad_bias


@_backward.register_fake
def _(grad, x, weight, needs, name):
    return _empty_grads(x, weight, needs)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.name = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 5
    needs = list(ctx.needs_input_grad[:3])
    grad_x, grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors, needs, ctx.name)
    return (
        grad_x if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias.to(ctx.bias_dtype) if needs[2] else None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether our products are faster in bf16 than torch's convolutions: not beside matrix units, which oneDNN has."""
    has_matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # private to torch
    return native.module().upsample_conv2x_multiplies_bf16() and not has_matrix_units()


def _dense(x: Tensor) -> Tensor:
    """With the channels innermost, at an address that 16-byte accesses take."""
    x = channels_last(x)
    return x.clone(memory_format=torch.channels_last) if x.data_ptr() % 16 else x


def _sizes(out: Tensor) -> tuple[int, int, int, int]:
    B, O, H, W = out.shape  # noqa: E741
    return B, H // 2, W // 2, O


def _letters(x: Tensor, out: Tensor) -> dict[str, int]:
    return dict(zip("BCHWO", (*x.shape, out.shape[1]), strict=True))


def _chunks(out: Tensor) -> int:
    return native.module().upsample_conv2x_chunks_cuda(_sizes(out), DTYPES["cuda"].index(out.dtype))


def _stream(x: Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = like.shape[0], channels, height, width
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _empty_outputs(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out = _empty(x, weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return out, x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)


def _empty_grads(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = needs
    return (
        _empty(x, *x.shape[1:]) if needs_x else x.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32),
    )


def _sliced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The phases by torch alone. A bias that learns goes on top of all four, so that its gradient is rounded once."""
    x = channels_last(x)
    H, W = x.shape[2:]
    bias = None if bias is None else bias.to(x.dtype)
    learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    out = _empty(x, weight.shape[0], 2 * H, 2 * W)
    for i, taps in enumerate(phase_weights(at_least_fp32(weight)).to(x.dtype).chunk(4)):
        a, b = divmod(i, 2)
        phase = F.conv2d(x, taps, None if learns else bias, padding=1)
        out[:, :, a::2, b::2] = phase[:, :, a : a + H, b : b + W]
    return out.add_(bias[:, None, None]) if bias is not None and learns else out


@overload
def upsample_conv2x(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stats_groups: None = None) -> Tensor: ...


@overload
def upsample_conv2x(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stats_groups: int
) -> tuple[Tensor, Tensor]: ...


def upsample_conv2x(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stats_groups: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)`` without the upsampled image.

    Args:
        x: (B, C, H, W) floating; copied unless it is channels_last in memory.
        weight: (O, C, 3, 3) of the same dtype (any floating dtype under autocast, which rules). On a CPU what is made
            of a frozen one is kept until any of its bytes changes.
        bias: (O,).
        stats_groups: of channels, for the GroupNorm that reads the result; divides O.

    Returns:
        (B, O, 2H, 2W), channels_last; with `stats_groups` also (B, groups, 2) fp32: mean and biased variance of each
        group over its channels and pixels, of the values as they are stored. They have no gradient of their own.
        Backends: `cuda` (fp32, bf16, fp16): a pass around a 2x2 convolution by torch; `cpu` (fp32, bf16): nine products
        of our own a pixel, in bf16 only where the processor multiplies that without matrix units, else that pass;
        `torch` (four convolutions, sliced); `reference` (fp32). In bf16 the differences that are multiplied are rounded
        once more: 3e-3 of the result's size where torch is 2e-3 off, at 128 channels of noise.

    Raises:
        ValueError: sizes that do not fit or are 0, dtypes that differ, groups that do not divide O.
    """
    tensors = {"x": (x, "BCHW"), "weight": (weight, "OCmn")} | ({} if bias is None else {"bias": (bias, "O")})
    sizes = check_shapes(**tensors)
    check_floating(**{key: tensor for key, (tensor, _) in tensors.items()})
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must be (O, C, 3, 3) but has shape {tuple(weight.shape)}")
    if not all(sizes[letter] for letter in "COHW"):
        raise ValueError(f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} must not be empty")
    if stats_groups is not None and (stats_groups < 1 or sizes["O"] % stats_groups):
        raise ValueError(f"stats_groups must divide the {sizes['O']} output channels but is {stats_groups}")
    dtypes = {tensor.dtype for tensor, _ in tensors.values()}
    autocast = autocast_dtype(x.device)
    if autocast is not None and torch.float64 not in dtypes:
        dtypes = {autocast}
    name = backend.pick(_OPERATOR, x.device.type, _unfit(dtypes))
    if len(dtypes) > 1:
        raise ValueError("x, weight and bias must have one dtype but have " + " and ".join(sorted(map(str, dtypes))))
    (dtype,) = dtypes
    if name in ("cuda", "cpu"):
        out, stats = _forward(x.to(dtype), weight, bias, stats_groups or 0, name)
        return out if stats_groups is None else (out, stats)
    if name == "torch":
        out = _sliced(x.to(dtype), weight, bias)
    else:
        out = channels_last(reference.upsample_conv2x(x, weight, bias).to(dtype))
    return out if stats_groups is None else (out, statistics(out, stats_groups))


def _unfit(dtypes: set[torch.dtype]) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in (*DTYPES, "torch"))
    found = []
    for name, taken in DTYPES.items():
        if len(dtypes) > 1 or not dtypes <= {*taken}:
            found.append((name, f"it does not compute in {' and '.join(sorted(map(str, dtypes)))}"))
    return tuple(found)
