"""linear: the affine map under every projection, with an exact GELU before or behind it.

T rows, I input width, O output width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.linear import config, reference
from stellar_fast.ops.checks import autocast_dtype, check_devices, check_floating, in_forward_mode, surely
from stellar_fast.ops.scratch import scratch
from stellar_fast.tune.lookup import knobs

Gelu = Literal["input", "output"] | None

# Below this many multiply-adds the dispatch of a registered operator (some 10 us) costs more than the faster product
# saves: 2 cores of a Zen 5 do 2^20 of them in about 10 us either way.
SMALL_PRODUCT = 1 << 20
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
_OPERATOR = "linear"


# x (T, I). Returns (out, preactivation): what enters a GELU at the output where `keep` asks for it, else of shape (0,).
@torch.library.custom_op("stellar_fast::linear", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None, keep: bool) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, "onednn")
    if gelu == "input":
        x = _gelu(x, scratch(x.shape, x.dtype, "gelu"))
    if gelu == "output" and not keep:
        # the algorithm "none" is oneDNN's exact GELU, "tanh" its approximation
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none"), x.new_empty(0)
    out = product("forward", _choose(x, weight).forward, x, weight, bias)
    return (_gelu(out), out) if gelu == "output" else (out, x.new_empty(0))


@_forward.register_fake
def _(x, weight, bias, gelu, keep):
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, torch.empty_like(out) if gelu == "output" and keep else x.new_empty(0)


# Returns (grad_x, grad_weight, grad_bias), of shape (0,) where `needs` does not ask for it.
@torch.library.custom_op("stellar_fast::linear_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, preactivation: Tensor, gelu: str | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, "onednn")
    needs_x, needs_weight, needs_bias = needs
    grad = _with_dense_rows(grad)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in needs)
    if gelu == "output":
        grad, _ = _gelu_backward(preactivation, grad)
    if needs_x:
        grad_x = product("grad_input", _choose(x, weight).grad_input, grad, weight)
    if gelu == "input" and needs_x:
        grad_x, x = _gelu_backward(x, grad_x, needs_weight, in_place=True)
    elif gelu == "input":
        x = _gelu(x, scratch(x.shape, x.dtype, "gelu"))
    sums = None
    if needs_weight:
        chosen = _choose(x, weight).grad_weight
        if needs_bias and _transposes_gradient(chosen):
            sums = grad.new_zeros(grad.shape[1], dtype=torch.float32)
        grad_weight = _grad_weight(chosen, grad, x, sums)
    if needs_bias:
        grad_bias = grad.sum(0) if sums is None else sums.to(grad.dtype)
    return grad_x, grad_weight, grad_bias


@_backward.register_fake
def _(grad, x, weight, preactivation, gelu, needs):
    shapes = x.shape, weight.shape, weight.shape[:1]
    grad_x, grad_weight, grad_bias = (
        x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )
    return grad_x, grad_weight, grad_bias


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.gelu, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 5
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward(grad, *ctx.saved_tensors, ctx.gelu, needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _choose(x: Tensor, weight: Tensor) -> config.Config:
    sizes = {"T": len(x), "I": weight.shape[1], "O": weight.shape[0]}
    return knobs(_OPERATOR, config, sizes, x.dtype, x.device)


def product(direction: str, chosen: config.Product, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """One of the three products on a CPU: x W^T + b of (x, W, b), dy W of (dy, W), or dy^T x of (dy, x)."""
    if direction == "forward":
        return F.linear(left, right, bias) if chosen.way == "matmul" else pointwise(left, right, bias)
    if direction == "grad_input":
        if chosen.way == "matmul":
            return left @ right
        return pointwise(left, transposed(right, "right") if chosen.way == "transposed" else right.t())
    return _grad_weight(chosen, left, right)


def _transposes_gradient(chosen: config.Product) -> bool:
    return native.available() and chosen.way in ("transposed", "half_transposed")


def _grad_weight(chosen: config.Product, grad: Tensor, x: Tensor, sums: Tensor | None = None) -> Tensor:
    """grad^T x; its column sums, the bias's gradient, are added to `sums` on the way of those that transpose grad."""
    slices = max(1, -(-len(grad) // chosen.slice_rows)) if chosen.slice_rows else 1
    total = None
    for part, rows in zip(grad.chunk(slices), x.chunk(slices), strict=True):
        out = _grad_weight_of_slice(chosen.way, part, rows, sums)
        total = out if total is None else total.add_(out)
    assert total is not None
    return total


def _grad_weight_of_slice(way: str, grad: Tensor, x: Tensor, sums: Tensor | None) -> Tensor:
    """In the layout of the weight: autograd would copy a transposed one."""
    if len(grad) == 0 or way == "matmul":
        return grad.t() @ x
    if way == "pointwise":
        return pointwise(grad.t(), x.t())
    if way == "transposed":
        return pointwise(transposed(grad, "left", sums), transposed(x, "right"))
    if way == "half_transposed":
        return transposed(grad, "left", sums) @ x
    like_weight = x.new_empty(()).expand(grad.shape[1], x.shape[1])  # asked for its shape alone
    return torch.ops.aten.mkldnn_linear_backward_weights(grad.to_mkldnn(), x.to_mkldnn(), like_weight, False)[0]


def transposed(x: Tensor, place: str | None, sums: Tensor | None = None) -> Tensor:
    """A dense copy of x^T in scratch memory, or in its own without a `place`; its row sums are added to `sums` (fp32).

    Without the native module a view, since torch's own copy takes longer than it saves.
    """
    if not native.available():
        return x.t()
    x = _with_dense_rows(x)
    shape = x.shape[1], x.shape[0]
    out = x.new_empty(shape) if place is None else scratch(shape, x.dtype, place)
    native.module().transpose(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        out.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def pointwise(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T + bias by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def _gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(x), in `out` where it is given and can be."""
    if not native.available():
        return F.gelu(x)
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    native.module().gelu_forward(
        x.data_ptr(), out.data_ptr(), x.numel(), x.dtype == torch.bfloat16, torch.get_num_threads()
    )
    return out


def _gelu_backward(x: Tensor, grad: Tensor, again: bool = False, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(gradient of x, gelu(x) if it is wanted `again`), in one pass over memory; `in_place` of grad."""
    if not native.available():
        return torch.ops.aten.gelu_backward(grad, x), F.gelu(x) if again else x
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, out = grad if in_place else torch.empty_like(x), scratch(x.shape, x.dtype, "gelu") if again else x
    native.module().gelu_backward(
        x.data_ptr(),
        grad.data_ptr(),
        grad_x.data_ptr(),
        out.data_ptr() if again else 0,
        x.numel(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return grad_x, out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: Gelu = None) -> Tensor:
    """``x weight^T + bias``, as `torch.nn.functional.linear`, with an exact (erf) GELU where one is asked for.

    Args:
        x: (..., I) floating.
        weight: (O, I) of the same dtype (any floating dtype under autocast, which rules).
        bias: (O,).
        gelu: "output" returns ``gelu(x weight^T + bias)``; "input" ``gelu(x) weight^T + bias``, whose backward keeps x
            alone and computes gelu(x) again: an MLP ``fc2(fc1(x), gelu="input")`` holds one hidden activation, not two.

    Returns:
        (..., O). Backends: `onednn` (fp32 and bf16 on a CPU, forward and all gradients, unless the product is small and
        nothing was asked for; the GELU is C++ in `stellar_fast._C`), `torch`, `reference` (fp32). On CUDA `torch` is
        cuBLAS, with the bias in its epilogue. The GELU epilogue of cuBLASLt is the tanh approximation, so an exact one
        stays a kernel of its own, and "input" keeps what torch keeps. `onednn` has no second derivative, and keeps up
        to 96 MiB of scratch memory for each thread that calls it (`stellar_fast.ops.scratch`).

    Raises:
        ValueError: widths, devices or dtypes that differ, integer tensors, an unknown `gelu`.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)} (O, I)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {tuple(bias.shape)} does not fit weight of shape {tuple(weight.shape)} (O, I)")
    if gelu not in (None, "input", "output"):
        raise ValueError(f"gelu must be None, 'input' or 'output' but is {gelu!r}")
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_devices(**tensors)
    check_floating(**tensors)
    dtypes = {t.dtype for t in tensors.values()}
    autocast = autocast_dtype(x.device)
    if autocast is not None and torch.float64 not in dtypes:
        dtypes = {autocast}
    name = backend.pick(_OPERATOR, x.device.type, _unfit(dtypes, x.numel() * weight.shape[0]))
    if len(dtypes) > 1:
        raise ValueError("x, weight and bias must have one dtype but have " + " and ".join(sorted(map(str, dtypes))))
    (dtype,) = dtypes
    if name == "reference":
        return reference.linear(x, weight, bias, gelu=gelu).to(dtype)
    if name == "torch":
        out = F.linear(F.gelu(x) if gelu == "input" else x, weight, bias)
        return F.gelu(out) if gelu == "output" else out
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    # the casts are part of the graph, so that gradients arrive in the dtypes of the parameters
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    cast_bias = None if bias is None else bias.to(dtype).contiguous()  # oneDNN's binding overlooks its stride
    out, _ = _forward(_with_dense_rows(rows), weight.to(dtype), cast_bias, gelu, keep)
    return out.view(*x.shape[:-1], weight.shape[0])


def _unfit(dtypes: set[torch.dtype], multiply_adds: int) -> tuple[tuple[str, str], ...]:
    """Why oneDNN cannot take this call, or should not where nothing was asked for."""
    reason = ""
    if in_forward_mode():
        reason = "it has no forward-mode derivative"
    elif len(dtypes) > 1 or not dtypes <= {*ONEDNN_DTYPES}:
        reason = f"it does not compute in {' and '.join(sorted(map(str, dtypes)))}"
    elif torch.bfloat16 in dtypes and not _onednn_has_bf16():
        reason = "it does not compute in torch.bfloat16 on this processor"
    elif surely(multiply_adds < SMALL_PRODUCT) and backend.requested(_OPERATOR) is None:
        reason = "the product is small"
    return (("onednn", reason),) if reason else ()


def _onednn_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


_onednn_has_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in backend.py


def _with_dense_rows(x: Tensor) -> Tensor:
    """With the elements of a row next to each other; rows may be strided, but not all at one place."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
