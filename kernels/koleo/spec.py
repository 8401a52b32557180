"""koleo for tests and benchmarks. N images, K tokens, width D."""

import torch
from torch import Tensor

from stellar_fast.kernels.koleo import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    return {"x": draw(generator, shape["N"], shape["K"], shape["D"], dtype=dtype, device=device)}


SPEC = OpSpec(
    name="koleo",
    shapes={
        "small": {"N": 2, "K": 5, "D": 12},
        "b16": {"N": 32, "K": 16, "D": 768},
        "b16_masked": {"N": 256, "K": 16, "D": 768},  # of batch 32 and 8 views
        "h16": {"N": 128, "K": 32, "D": 1280},
    },
    odd_shapes=(
        {"N": 1, "K": 2, "D": 1},
        {"N": 3, "K": 17, "D": 7},
        {"N": 1, "K": 24, "D": 40},
        {"N": 2, "K": 64, "D": 33},
    ),
    make_inputs=make_inputs,
    reference=by_argument(reference.koleo),
    gradients=("x",),
    flops=lambda s: 2.0 * s["N"] * s["K"] ** 2 * s["D"],
    bytes=lambda s, itemsize: float(itemsize * s["N"] * s["K"] * s["D"]),
)
