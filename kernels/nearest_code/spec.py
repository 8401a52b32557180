"""nearest_code for tests and benchmarks. N vectors of width E, S codebook entries."""

import torch
from torch import Tensor

from stellar_fast.kernels.nearest_code import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    sizes = {"z": (shape["N"], shape["E"]), "codebook": (shape["S"], shape["E"])}
    return {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}


SPEC = OpSpec(
    name="nearest_code",
    shapes={
        "small": {"N": 50, "E": 7, "S": 20},
        "b16": {"N": 32 * 196, "E": 256, "S": 1024},
    },
    odd_shapes=({"N": 1, "E": 1, "S": 1}, {"N": 33, "E": 65, "S": 129}, {"N": 0, "E": 8, "S": 4}),
    make_inputs=make_inputs,
    reference=by_argument(reference.nearest_code),
    flops=lambda s: 2.0 * s["N"] * s["E"] * s["S"],
    bytes=lambda s, itemsize: float(itemsize * s["E"] * (s["N"] + s["S"]) + 8 * s["N"]),
)
