"""sinkhorn for tests and benchmarks. R rows (tokens), C columns (prototypes)."""

import dataclasses

import torch
from torch import Tensor

from stellar_fast.kernels.sinkhorn import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cosines as logits."""
    return {"logits": (0.1 * draw(generator, shape["R"], shape["C"], dtype=torch.float64, device=device)).to(dtype)}


SPEC = OpSpec(
    name="sinkhorn",
    public="sinkhorn_knopp",
    shapes={
        "small": {"R": 12, "C": 20},
        "b16": {"R": 1024, "C": 16384},  # sparse tokens of 64 images
        "b16_gpu": {"R": 2048, "C": 16384},  # of 128
        "b16_cls": {"R": 128, "C": 16384},
        "wide": {"R": 256, "C": 131072},
    },
    odd_shapes=({"R": 1, "C": 1}, {"R": 1, "C": 37}, {"R": 67, "C": 3}),
    make_inputs=make_inputs,
    reference=by_argument(reference.sinkhorn_knopp),
    flops=lambda s: 14.0 * s["R"] * s["C"],  # an exponential, and three rounds of two sums and two scalings
    # All column sums come before the first row's divisor, all rows before the next round's columns: three rounds are
    # four passes over the logits, unless they stay in a cache; then the assignments are written.
    bytes=lambda s, itemsize: float((4 * itemsize + 4) * s["R"] * s["C"]),
)

# The room's other function, which writes a number a row and a column.
POTENTIALS = dataclasses.replace(
    SPEC,
    public="sinkhorn_potentials",
    reference=by_argument(reference.sinkhorn_potentials),
    bytes=lambda s, itemsize: float(4 * itemsize * s["R"] * s["C"] + 4 * (s["R"] + s["C"])),
)
