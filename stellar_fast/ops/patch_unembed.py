"""patch_unembed: tokens to an image, by a transposed convolution whose patches do not overlap.

B images, P patches, H width, C channels, S side of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.precision import without_autocast
from stellar_fast.kernels.linear import config
from stellar_fast.kernels.patch_unembed import reference
from stellar_fast.ops.checks import (
    autocast_dtype,
    check_floating,
    check_positive,
    check_shapes,
    in_forward_mode,
    surely,
)
from stellar_fast.ops.linear import SMALL_PRODUCT, product
from stellar_fast.tune.lookup import knobs, threads

DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),  # in the order of csrc/common/launch.h
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "patch_unembed"
_LETTERS = {"x": "BPH", "weight": "HCSS", "bias": "C"}


# x (B, P, H) and weight (H, C, S, S) are dense and of one dtype, `rows` and `columns` those of patches.
@torch.library.custom_op("stellar_fast::patch_unembed", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, name: str) -> Tensor:
    backend.ran(_OPERATOR, name)
    patches = _product("grad_input", x.flatten(0, 1), weight.flatten(1), weight)
    image = _empty_image(x, weight, rows, columns)
    sizes = _sizes(image, weight, rows, columns)
    bias_address = 0 if bias is None else bias.data_ptr()
    if name == "cuda":
        native.module().patch_unembed_forward_cuda(
            *_stream(x), sizes, patches.data_ptr(), bias_address, image.data_ptr(), DTYPES["cuda"].index(x.dtype)
        )
    else:
        native.module().patch_unembed_forward(
            sizes,
            patches.data_ptr(),
            bias_address,
            image.data_ptr(),
            x.dtype == torch.bfloat16,
            threads(_OPERATOR, dict(zip("BCYXS", sizes, strict=True)), x.dtype).forward,
        )
    return image


@_forward.register_fake
def _(x, weight, bias, rows, columns, name):
    return _empty_image(x, weight, rows, columns)


# Returns (grad_x, grad_weight, grad_bias), of shape (0,) where `needs` does not ask for it.
@torch.library.custom_op("stellar_fast::patch_unembed_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, rows: int, columns: int, needs: list[bool], name: str
) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    needs_x, needs_weight, needs_bias = needs
    grad, tokens, matrix = grad.contiguous(), x.flatten(0, 1), weight.flatten(1)
    patches = grad.new_empty(len(tokens), matrix.shape[1])
    sums = grad.new_empty(len(grad), weight.shape[1], rows, dtype=torch.float32)
    sizes = _sizes(grad, weight, rows, columns)
    if name == "cuda":
        native.module().patch_unembed_backward_cuda(
            *_stream(x),
            sizes,
            grad.data_ptr(),
            patches.data_ptr(),
            sums.data_ptr(),
            DTYPES["cuda"].index(grad.dtype),
        )
    else:
        native.module().patch_unembed_backward(
            sizes,
            grad.data_ptr(),
            patches.data_ptr(),
            sums.data_ptr(),
            grad.dtype == torch.bfloat16,
            threads(_OPERATOR, dict(zip("BCYXS", sizes, strict=True)), x.dtype).backward,
        )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in needs)
    if needs_x:
        grad_x = _product("forward", patches, matrix, weight).view(x.shape)
    if needs_weight:
        grad_weight = _product("grad_weight", tokens, patches, weight).view(weight.shape)
    if needs_bias:
        grad_bias = sums.sum((0, 2)).to(x.dtype)
    return grad_x, grad_weight, grad_bias


@_backward.register_fake
def _(grad, x, weight, rows, columns, needs, name):
    shapes = x.shape, weight.shape, weight.shape[1:2]
    grad_x, grad_weight, grad_bias = (
        x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )
    return grad_x, grad_weight, grad_bias


def _save(ctx, inputs, output) -> None:
    x, weight, _, *ctx.sizes, ctx.name = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad: Tensor):
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward(grad, *ctx.saved_tensors, *ctx.sizes, needs, ctx.name)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _product(direction: str, left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """One of `linear`'s: this is a linear map with this weight, of a patch's C S S pixels to H, gone backwards."""
    chosen = config.Product("matmul")
    if left.device.type == "cpu" and _onednn(left.dtype):
        H, pixels = weight.flatten(1).shape
        sizes = {"T": len(left), "I": pixels, "O": H}
        chosen = getattr(knobs("linear", config, sizes, left.dtype, left.device), direction)
    with without_autocast(left):
        return product(direction, chosen, left, right)


def _onednn(dtype: torch.dtype) -> bool:
    return not backend.why_not("onednn") and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _empty_image(x: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    _, C, S, _ = weight.shape
    return x.new_empty(x.shape[0], C, rows * S, columns * S)


def _sizes(image: Tensor, weight: Tensor, rows: int, columns: int) -> tuple[int, int, int, int, int]:
    return image.shape[0], image.shape[1], rows, columns, weight.shape[-1]


def _stream(x: Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def patch_unembed(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Tokens to pixels: `torch.nn.functional.conv_transpose2d` with stride = kernel, of tokens, not of a feature map.

    Args:
        x: (B, P, H) floating, the patches row by row.
        weight: (H, C, S, S) of the same dtype (any floating dtype under autocast, which rules).
        bias: (C,), or None.
        patch_size: S, in pixels.
        grid: (rows, columns) of patches, P together.

    Returns:
        (B, C, rows S, columns S), contiguous.
        Backends: `cuda` (fp32, bf16, fp16) and `cpu` (fp32, bf16; small products only when asked for), which lay the
        products of torch's libraries, oneDNN on a CPU, into the image and back; `torch`; `reference` (fp32). The first
        two have no second derivative.

    Raises:
        ValueError: sizes, devices or dtypes that differ, sizes of zero (but for B), integer tensors.

    Source: the head over pixels of STELLAR (arXiv 2602.01905).
    """
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    sizes = check_shapes(**{name: (tensor, _LETTERS[name]) for name, tensor in tensors.items()})
    check_floating(**tensors)
    rows, columns = grid
    check_positive(H=sizes["H"], C=sizes["C"], patch_size=patch_size, rows=rows, columns=columns)
    if sizes["S"] != patch_size:
        raise ValueError(f"patch_size is {patch_size} but weight has patches of {sizes['S']}")
    if rows * columns != sizes["P"]:
        raise ValueError(f"a grid of {rows} x {columns} patches has {rows * columns} but x has {sizes['P']}")
    dtypes = {t.dtype for t in tensors.values()}
    autocast = autocast_dtype(x.device)
    if autocast is not None and torch.float64 not in dtypes:
        dtypes = {autocast}
    name = backend.pick(_OPERATOR, x.device.type, _unfit(dtypes, x.numel() * weight[0].numel()))
    if len(dtypes) > 1:
        raise ValueError("x, weight and bias must have one dtype but have " + " and ".join(sorted(map(str, dtypes))))
    (dtype,) = dtypes
    if name == "reference":
        return reference.patch_unembed(x, weight, bias, patch_size, grid).to(dtype)
    if name == "torch":
        return F.conv_transpose2d(x.mT.unflatten(2, grid), weight, bias, stride=patch_size).contiguous()
    # the casts are part of the graph, so that gradients arrive in the dtypes of the parameters
    cast_bias = None if bias is None else bias.to(dtype).contiguous()
    return _forward(x.to(dtype).contiguous(), weight.to(dtype).contiguous(), cast_bias, rows, columns, name)


def _unfit(dtypes: set[torch.dtype], multiply_adds: int) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, or should not where nothing was asked for, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in DTYPES)
    names = " and ".join(sorted(map(str, dtypes)))
    unfit = [
        (name, f"it does not compute in {names}")
        for name, taken in DTYPES.items()
        if len(dtypes) > 1 or not dtypes <= {*taken}
    ]
    if surely(multiply_adds < SMALL_PRODUCT) and backend.requested(_OPERATOR) is None:
        unfit.append(("cpu", "the product is small"))
    return tuple(unfit)
