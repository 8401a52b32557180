"""token_match for tests and benchmarks. B images, V views, K tokens of width D."""

import torch
from torch import Tensor

from stellar_fast.kernels.token_match import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Two unrelated sets of tokens: every distance is near sqrt(2 D), and the plan decided by small differences."""
    B, V, K, D = shape["B"], shape["V"], shape["K"], shape["D"]
    sizes = {"pred": (B, V, K, D), "target": (B, K, D)}
    return {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}


SPEC = OpSpec(
    name="token_match",
    shapes={
        "small": {"B": 2, "V": 3, "K": 4, "D": 8},
        "b16": {"B": 32, "V": 8, "K": 16, "D": 768},
        "b24": {"B": 32, "V": 8, "K": 24, "D": 768},
        "h16": {"B": 128, "V": 8, "K": 16, "D": 1280},
    },
    odd_shapes=(
        {"B": 1, "V": 1, "K": 1, "D": 1},
        {"B": 1, "V": 2, "K": 2, "D": 33},
        {"B": 2, "V": 1, "K": 17, "D": 5},
        {"B": 1, "V": 2, "K": 24, "D": 40},
        {"B": 1, "V": 1, "K": 64, "D": 33},
        {"B": 0, "V": 2, "K": 5, "D": 4},
    ),
    make_inputs=make_inputs,
    reference=by_argument(reference.token_match),
    flops=lambda s: s["B"] * s["V"] * s["K"] ** 2 * (3.0 * s["D"] + 2 * 5 * 4),
    bytes=lambda s, itemsize: float(s["B"] * s["K"] * (itemsize * s["D"] * (s["V"] + 1) + 8 * s["V"])),
)
