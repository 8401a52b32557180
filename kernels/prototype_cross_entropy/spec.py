"""prototype_cross_entropy for tests and benchmarks. R predictions, T targets, C prototypes."""

import torch
from torch import Tensor

from stellar_fast.kernels.prototype_cross_entropy import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cosines as logits, peaked targets, and each target learned by R / T predictions."""
    R, T, C = shape["R"], shape["T"], shape["C"]
    logits = 0.3 * draw(generator, R, C, dtype=torch.float64, device=device)
    targets = (5 * draw(generator, T, C, dtype=torch.float64, device=device)).softmax(dim=-1)
    index = torch.randint(0, T, (R,), generator=generator).to(device)
    return {"logits": logits.to(dtype), "targets": targets.to(dtype), "index": index}


SPEC = OpSpec(
    name="prototype_cross_entropy",
    shapes={
        "small": {"R": 6, "T": 4, "C": 9},
        "b16": {"R": 1024, "T": 128, "C": 16384},  # the masked tokens of eight images
        "b16_128": {"R": 16384, "T": 2048, "C": 16384},
    },
    odd_shapes=({"R": 1, "T": 1, "C": 1}, {"R": 17, "T": 3, "C": 131}),
    make_inputs=make_inputs,
    reference=by_argument(reference.prototype_cross_entropy),
    gradients=("logits",),
    flops=lambda s: 5.0 * s["R"] * s["C"],
    bytes=lambda s, itemsize: float(itemsize * s["C"] * (s["R"] + s["T"]) + 8 * s["R"]),
)
