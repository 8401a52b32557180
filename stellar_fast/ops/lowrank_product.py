"""lowrank_product: cosine, softmax over tokens, product with the tokens, and the peak, in one operator.

B images, P patches, K sparse tokens, D key width, E value width.
"""

import torch
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.lowrank_product import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes, in_forward_mode, with_dense_rows
from stellar_fast.tune.lookup import knobs, threads

# Largest sizes that the kernels take: a patch's tokens stay in registers, an image's packed tokens in the caches.
LARGEST = {"P": 4096, "K": 64, "D": 2048, "E": 2048}
DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "lowrank_product"
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# All backends return (out, localization, peak, logits, query_scale, key_scale). The last three are what the backward
# keeps beside the inputs: logits (B,P,K) = (query . key) query_scale key_scale / temperature, and the scales (B,P) and
# (B,K) are 1 / norm, or exactly 1e7 where the norm does not exceed 1e-7. At temperature None query_scale is 1 / sqrt(D)
# and key_scale 1. A localization that was not asked for has shape (0,).
@torch.library.custom_op("stellar_fast::lowrank_product", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: float | None,
    bias: Tensor | None,
    return_localization: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.lowrank_product import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(query, value), _widest(query, value), query.device)
        return kernel.launch_lowrank_product_fwd(query, key, value, temperature, bias, return_localization, chosen)
    out, localization, peak, logits, query_scale, key_scale = outputs = _empty_outputs(
        query, key, value, return_localization
    )
    native.module().lowrank_product_forward(
        tuple(_sizes(query, value).values()),
        *map(_matrices, (query, key, value)),
        0 if bias is None else bias.data_ptr(),
        temperature or 0.0,
        out.data_ptr(),
        localization.data_ptr() if return_localization else 0,
        peak.data_ptr(),
        logits.data_ptr(),
        query_scale.data_ptr(),
        key_scale.data_ptr(),
        threads(_OPERATOR, _sizes(query, value), _widest(query, value)).forward,
    )
    return outputs


@_forward.register_fake
def _(query, key, value, temperature, bias, return_localization, name):
    return _empty_outputs(query, key, value, return_localization)


@torch.library.custom_op("stellar_fast::lowrank_product_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_localization: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    temperature: float | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    grad_out = with_dense_rows(grad_out)
    grad_localization = None if grad_localization is None else grad_localization.contiguous()
    if name == "triton":
        from stellar_fast.kernels.lowrank_product import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(query, value), _widest(query, value), query.device)
        saved = query, key, value, logits, query_scale, key_scale
        return kernel.launch_lowrank_product_bwd(grad_out.contiguous(), grad_localization, *saved, temperature, chosen)
    grads = _empty_grads(query, key, value)
    native.module().lowrank_product_backward(
        tuple(_sizes(query, value).values()),
        _matrices(grad_out),
        0 if grad_localization is None else grad_localization.data_ptr(),
        *map(_matrices, (query, key, value)),
        *(x.data_ptr() for x in (logits, query_scale, key_scale)),
        temperature or 0.0,
        *(x.data_ptr() for x in grads),
        threads(_OPERATOR, _sizes(query, value), _widest(query, value)).backward,
    )
    return grads


@_backward.register_fake
def _(grad_out, grad_localization, query, key, value, logits, query_scale, key_scale, temperature, name):
    return _empty_grads(query, key, value)


def _save(ctx, inputs, output) -> None:
    query, key, value, ctx.temperature, _, return_localization, ctx.name = inputs
    _, localization, *without_gradient = output
    ctx.save_for_backward(query, key, value, *without_gradient[1:])  # all but the peak
    if not (return_localization and any(ctx.needs_input_grad[:2])):
        without_gradient.append(localization)
    ctx.mark_non_differentiable(*without_gradient)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Tensor | None, grad_localization: Tensor | None, *_):
    if grad_out is None and grad_localization is None:
        return (None,) * 7
    query, _, value, *_ = ctx.saved_tensors
    rows = grad_out
    if rows is None:  # through the localization alone, on which value and bias have no influence
        rows = value.new_zeros(*query.shape[:2], value.shape[2], dtype=torch.float32)
    grad_query, grad_key, grad_value = _backward(rows, grad_localization, *ctx.saved_tensors, ctx.temperature, ctx.name)
    if grad_out is None:
        return grad_query, grad_key, *(None,) * 5
    grad_bias = grad_out.sum(0) if ctx.needs_input_grad[4] else None
    return grad_query, grad_key, grad_value, None, grad_bias, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def lowrank_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    temperature: float | None = 0.06,
    bias: Tensor | None = None,
    return_localization: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Low-rank image embedding ``softmax_K(cos(query, key) / temperature) value + bias``.

    Args:
        query: (B, P, D) floating, one row a patch, before normalisation.
        key: (B, K, D) floating, one row a sparse token, before normalisation.
        value: (B, K, E) floating.
        temperature: divides the cosine; None takes the dot product over sqrt(D) instead.
        bias: (P, E) added to every image's product.
        return_localization: also return the localization matrix.

    Returns:
        out (B, P, E) fp32; localization (B, P, K) fp32 with rows that sum to one, or None;
        peak (B, K) fp32, the largest localization over the patches, without gradient. Everything is computed in fp32
        whatever the dtypes, which may differ, and whether or not under autocast; fp64 where an argument is fp64.
        Backends: `triton` (fp32, bf16, fp16) and `cpu` (fp32, bf16) for K <= 64, D and E <= 2048, P <= 4096;
        `reference` for the rest.

    Raises:
        ValueError: shapes that do not fit together, an empty one but for B, integer tensors, a temperature that is not
            positive.

    Source: STELLAR (arXiv 2602.01905), localization and low-rank embedding.
    """
    arguments = {"query": (query, "BPD"), "key": (key, "BKD"), "value": (value, "BKE")}
    sizes = check_shapes(**arguments if bias is None else arguments | {"bias": (bias, "PE")})
    check_floating(query=query, key=key, value=value, **({} if bias is None else {"bias": bias}))
    check_positive(**{letter: sizes[letter] for letter in LARGEST})
    if temperature is not None:
        check_positive(temperature=temperature)
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    name = backend.pick(_OPERATOR, query.device.type, _unfit(sizes, tensors))
    if name == "reference":
        out, localization, peak = reference.lowrank_product(query, key, value, temperature, bias)
    else:
        query, key, value = map(with_dense_rows, (query, key, value))
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        out, localization, peak, *_ = _forward(query, key, value, temperature, bias, return_localization, name)
    return out, localization if return_localization else None, peak


def _unfit(sizes: dict[str, int], tensors: tuple[Tensor, ...]) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    reasons = []
    if in_forward_mode():
        reasons.append("it has no forward-mode derivative")
    for letter, largest in LARGEST.items():
        if sizes[letter] > largest:
            reasons.append(f"{letter} {sizes[letter]} is above {largest}")
    unfit = [(name, reason) for name in DTYPES for reason in reasons[:1]]
    for name, dtypes in DTYPES.items():
        unfit += [(name, f"it does not compute in {x.dtype}") for x in tensors if x.dtype not in dtypes]
    return tuple(unfit)


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    (B, P, D), (_, K, E) = query.shape, value.shape
    return {"B": B, "P": P, "K": K, "D": D, "E": E}


def _widest(query: Tensor, value: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, value.dtype)


def _matrices(x: Tensor) -> tuple[int, bool, int, int]:
    return x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), x.stride(1)


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor, return_localization: bool) -> _Outputs:
    (B, P, _), (K, E) = query.shape, value.shape[1:]

    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    localization = empty(B, P, K) if return_localization else empty(0)
    return empty(B, P, E), localization, empty(B, K), empty(B, P, K), empty(B, P), empty(B, K)


def _empty_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
