"""lowrank_product for tests and benchmarks. B images, P patches, K sparse tokens, D key width, E value width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.lowrank_product import reference
from stellar_fast.registry import OpSpec, Shape, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor | bool]:
    B, P, K, D, E = (shape[letter] for letter in "BPKDE")
    sizes = {"query": (B, P, D), "key": (B, K, D), "value": (B, K, E), "bias": (P, E)}
    tensors = {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}
    return tensors | {"return_localization": True}


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: float | None = 0.06,
    bias: Tensor | None = None,
    return_localization: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    out, localization, peak = reference.lowrank_product(query, key, value, temperature, bias)
    return out, localization if return_localization else None, peak


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: float | None = 0.06,
    bias: Tensor | None = None,
    return_localization: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The formula as it is usually written, every step in the inputs' own dtype."""
    if temperature is None:
        logits = query @ key.mT / math.sqrt(query.shape[-1])
    else:
        logits = F.normalize(query, dim=-1, eps=1e-7) @ F.normalize(key, dim=-1, eps=1e-7).mT / temperature
    localization = logits.softmax(dim=-1)
    out = localization @ value
    if bias is not None:
        out = out + bias
    return out, localization if return_localization else None, localization.detach().amax(dim=1)


def _flops(shape: Shape) -> float:
    return 2.0 * shape["B"] * shape["P"] * shape["K"] * (shape["D"] + shape["E"])


def _bytes(shape: Shape, itemsize: int) -> float:
    """Query, key and value read; out, the logits and the peak written in fp32."""
    B, P, K, D, E = (shape[letter] for letter in "BPKDE")
    return float(B * (itemsize * (P * D + K * D + K * E) + 4 * (P * E + P * K + K)))


SPEC = OpSpec(
    name="lowrank_product",
    shapes={
        "small": {"B": 2, "P": 33, "K": 5, "D": 24, "E": 20},
        "b16": {"B": 32, "P": 196, "K": 16, "D": 768, "E": 512},
        "b16_encode": {"B": 8, "P": 196, "K": 16, "D": 768, "E": 768},
    },
    odd_shapes=(
        {"B": 0, "P": 7, "K": 4, "D": 8, "E": 8},
        {"B": 1, "P": 1, "K": 1, "D": 1, "E": 1},
        {"B": 3, "P": 1, "K": 24, "D": 16, "E": 9},
        {"B": 2, "P": 17, "K": 64, "D": 33, "E": 31},
        {"B": 1, "P": 70, "K": 17, "D": 47, "E": 65},
    ),
    make_inputs=make_inputs,
    reference=_reference,
    eager=eager,
    gradients=("query", "key", "value", "bias"),
    flops=_flops,
    bytes=_bytes,
)
