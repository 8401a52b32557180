"""linear: the affine map under every projection; on a CPU through whichever library multiplies faster there."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from stellar_fast import backend
from stellar_fast.kernels.linear import reference
from stellar_fast.ops.checks import check_floating

# Below this many multiply-adds the dispatch of a registered operator (some 10 us) costs more than the faster product
# saves: 2 cores of a Zen 5 do 2^20 of them in about 10 us either way.
SMALL_PRODUCT = 1 << 20


@torch.library.custom_op("stellar_fast::linear_onednn", mutates_args=(), device_types="cpu")
def _linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_linear_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = _linear_onednn(grad, weight.t(), None) if needs_x else None
    # dW = dy^T x = (x^T dy)^T: written so, both transposes are views that oneDNN reads in place
    grad_weight = _linear_onednn(x.reshape(-1, x.shape[-1]).t(), rows.t(), None).t() if needs_weight else None
    return grad_x, grad_weight, rows.sum(0) if ctx.has_bias and needs_bias else None


_linear_onednn.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as `torch.nn.functional.linear`.

    Args:
        x: (..., I) floating.
        weight: (O, I) of the same dtype (any floating dtype under autocast, which rules).
        bias: (O,).

    Returns:
        (..., O). Backends: `onednn` (fp32 on a CPU, forward and both gradients, unless the product is small), `torch`,
        `reference` (fp32).

    Raises:
        ValueError: widths that differ, or integer tensors.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)} (O, I)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {tuple(bias.shape)} does not fit weight of shape {tuple(weight.shape)} (O, I)")
    check_floating(x=x, weight=weight)
    name = backend.pick("linear")
    if name == "reference":
        return reference.linear(x, weight, bias)
    if name == "onednn" and _suits_onednn(x, weight):
        return _linear_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """fp32 on a CPU outside autocast, and large enough. In bf16 torch itself goes through oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0  # a registered operator has no forward-mode derivative: torch would take zero
        and x.numel() * weight.shape[0] >= SMALL_PRODUCT
    )
