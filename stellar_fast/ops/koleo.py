"""koleo: Kozachenko-Leonenko spread of the tokens within an image. N images, K tokens of width D."""

import torch
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.koleo import reference
from stellar_fast.ops.checks import check_floating, check_shapes, in_forward_mode
from stellar_fast.tune.lookup import knobs, threads

LARGEST_K = 64  # tokens whose K x K products the kernels keep in registers or in the first-level cache
DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "koleo"


# All backends return (loss, index, distance, norm), the last three (N, K) as what the backward keeps beside x: the
# nearest other token, the distance to it before the floor, and the norm, which is exactly 1e-8 where it was below.
@torch.library.custom_op("stellar_fast::koleo", mutates_args=())
def _forward(x: Tensor, min_distance: float, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.koleo import config, kernel

        return kernel.launch_koleo_fwd(x, min_distance, knobs(_OPERATOR, config, _sizes(x), x.dtype, x.device))
    loss, index, distance, norm = outputs = _empty_outputs(x)
    kept = (index.data_ptr(), distance.data_ptr(), norm.data_ptr(), threads(_OPERATOR, _sizes(x), x.dtype).forward)
    loss.fill_(native.module().koleo_forward(*x.shape, _tokens(x), min_distance, *kept))
    return outputs


@_forward.register_fake
def _(x, min_distance, name):
    return _empty_outputs(x)


@torch.library.custom_op("stellar_fast::koleo_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    x: Tensor,
    index: Tensor,
    distance: Tensor,
    norm: Tensor,
    min_distance: float,
    name: str,
) -> Tensor:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.koleo import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(x), x.dtype, x.device)
        return kernel.launch_koleo_bwd(grad_loss, x, index, distance, norm, min_distance, chosen)
    grad_x = x.new_empty(x.shape)
    native.module().koleo_backward(
        *x.shape,
        _tokens(x),
        min_distance,
        index.data_ptr(),
        distance.data_ptr(),
        norm.data_ptr(),
        grad_loss.item(),
        grad_x.data_ptr(),
        threads(_OPERATOR, _sizes(x), x.dtype).backward,
    )
    return grad_x


@_backward.register_fake
def _(grad_loss, x, index, distance, norm, min_distance, name):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, ctx.min_distance, ctx.name = inputs
    _, *kept = output
    ctx.save_for_backward(x, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_loss: Tensor | None, *_):
    if grad_loss is None:
        return None, None, None
    return _backward(grad_loss, *ctx.saved_tensors, ctx.min_distance, ctx.name), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def koleo(x: Tensor, *, min_distance: float = 0.0) -> Tensor:
    """KoLeo loss within each image's K tokens: minus the mean log distance to the nearest other token.

    Args:
        x: (N, K, D) floating, K >= 2; normalised inside.
        min_distance: floor of the distance between normalised tokens. At the exact default 0 the gradient of
            near-identical tokens reaches 1e7; below a floor > 0 the gradient is zero and the loss bounded.

    Returns:
        0-dim loss, computed in fp32 whatever the dtype, and under autocast too (fp64 where x is). Its gradient reaches
        both ends of each pair, and is the same every time.
        Backends: `triton` (fp32, bf16, fp16) and `cpu` (fp32, bf16) for K <= 64; `reference` for the rest.

    Raises:
        ValueError: not three dimensions, no images, fewer than two tokens, an integer tensor, a negative floor.

    Source: "Spreading vectors for similarity search" (arXiv 1806.03198); within the image: STELLAR (arXiv 2602.01905).
    """
    sizes = check_shapes(x=(x, "NKD"))
    check_floating(x=x)
    if sizes["K"] < 2:
        raise ValueError(f"koleo needs at least 2 tokens an image but x has {sizes['K']}")
    if not sizes["N"]:
        raise ValueError("x has 0 images: the mean over none is not defined")
    if not sizes["D"]:
        raise ValueError("x has tokens of width 0")
    if min_distance < 0:
        raise ValueError(f"min_distance must be at least 0 but is {min_distance}")
    name = backend.pick(_OPERATOR, x.device.type, _unfit(x))
    if name == "reference":
        return reference.koleo(x, min_distance)
    return _forward(_with_dense_tokens(x), min_distance, name)[0]


def _unfit(x: Tensor) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in DTYPES)
    if x.shape[1] > LARGEST_K:
        return tuple((name, f"K {x.shape[1]} is above {LARGEST_K}") for name in DTYPES)
    return tuple(
        (name, f"it does not compute in {x.dtype}") for name, dtypes in DTYPES.items() if x.dtype not in dtypes
    )


def _with_dense_tokens(x: Tensor) -> Tensor:
    """With the elements of a token next to each other; images and tokens may be strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sizes(x: Tensor) -> dict[str, int]:
    return dict(zip("NKD", x.shape, strict=True))


def _tokens(x: Tensor) -> tuple[int, bool, int, int, int]:
    return x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), 0, x.stride(1)


def _empty_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = x.new_empty(x.shape[:2], dtype=torch.int64)
    distance, norm = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty((), dtype=torch.float32), index, distance, norm
