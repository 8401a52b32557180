"""lowrank_product: cosine, softmax over tokens, product with the tokens, and the peak, in one operator."""

from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.lowrank_product import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes


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
        peak (B, K) fp32, the largest localization over the patches, without gradient.

    Raises:
        ValueError: shapes that do not fit together, integer tensors, a temperature that is not positive.

    Source: STELLAR (arXiv 2602.01905), localization and low-rank embedding.
    """
    backend.pick("lowrank_product")
    shapes = {"query": (query, "BPD"), "key": (key, "BKD"), "value": (value, "BKE")}
    check_shapes(**shapes if bias is None else shapes | {"bias": (bias, "PE")})
    check_floating(query=query, key=key, value=value, **({} if bias is None else {"bias": bias}))
    if temperature is not None:
        check_positive(temperature=temperature)
    out, localization, peak = reference.lowrank_product(query, key, value, temperature, bias)
    return out, localization if return_localization else None, peak
