"""prototype_cross_entropy for tests and benchmarks. R predictions, T targets, C prototypes, E prototype width."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.prototype_cross_entropy import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Normalised features, prototypes as they are initialised, peaked targets that R / T predictions each learn."""
    R, T, C, E = (shape[letter] for letter in "RTCE")
    features, clean = (F.normalize(draw(generator, n, E, dtype=torch.float64, device=device), dim=-1) for n in (R, T))
    prototypes = draw(generator, C, E, dtype=torch.float64, device=device)
    logits, temperature = clean @ prototypes.T, 0.06
    column = 0.1 * draw(generator, C, dtype=torch.float64, device=device)
    # rows do not sum to one
    row = 0.1 * draw(generator, T, dtype=torch.float64, device=device) - (logits / temperature + column).logsumexp(1)
    sinkhorn = importlib.import_module("stellar_fast.ops.sinkhorn")
    targets = sinkhorn.SinkhornTargets(row.float(), column.float(), temperature, logits.to(dtype))
    index = torch.randint(0, T, (R,), generator=generator).to(device)
    return {"features": features.to(dtype), "prototypes": prototypes.to(dtype), "targets": targets, "index": index}


def eager(
    features: Tensor, prototypes: Tensor, targets: Any, index: Tensor | None = None, temperature: float = 0.12
) -> Tensor:
    """As a model computes it: logits in the dtype of features and prototypes, the loss of them in fp32."""
    target = reference.dense_targets(targets, len(prototypes), torch.float32)
    target = target if index is None else target[index]
    logits = F.linear(features, prototypes.to(features.dtype)).float()
    return -(target * F.log_softmax(logits / temperature, dim=-1)).sum(dim=-1).mean()


def _bytes(shape: Shape, itemsize: int) -> float:
    """Features, prototypes and the targets' logits read."""
    return float(itemsize * (shape["E"] * (shape["R"] + shape["C"]) + shape["T"] * shape["C"]))


SPEC = OpSpec(
    name="prototype_cross_entropy",
    shapes={
        "small": {"R": 6, "T": 4, "C": 37, "E": 16},
        "b16": {"R": 1024, "T": 128, "C": 16384, "E": 256},  # the masked tokens of eight images
        "b16_128": {"R": 16384, "T": 2048, "C": 16384, "E": 256},
    },
    odd_shapes=({"R": 1, "T": 1, "C": 1, "E": 1}, {"R": 17, "T": 3, "C": 131, "E": 24}),
    make_inputs=make_inputs,
    reference=by_argument(reference.prototype_cross_entropy),
    eager=eager,
    gradients=("features", "prototypes"),
    flops=lambda s: 2.0 * s["R"] * s["C"] * s["E"],
    bytes=_bytes,
    backward=3.0,  # where the logits are multiplied again
)
