"""patch_unembed for tests and benchmarks. B images, Y x X patches, H width, C channels, S side of a patch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.patch_unembed import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    B, Y, X, H, C, S = (shape[letter] for letter in "BYXHCS")
    sizes = {"x": (B, Y * X, H), "weight": (H, C, S, S), "bias": (C,)}
    tensors = {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}
    return tensors | {"patch_size": S, "grid": (Y, X)}


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """As a module of torch computes it."""
    return F.conv_transpose2d(x.mT.unflatten(2, grid), weight, bias, stride=patch_size).contiguous()


def _bytes(s: Shape, itemsize: int) -> float:
    pixels = s["C"] * s["S"] ** 2
    return float(itemsize * (s["B"] * s["Y"] * s["X"] * (s["H"] + pixels) + s["H"] * pixels))


SPEC = OpSpec(
    name="patch_unembed",
    shapes={
        "small": {"B": 2, "Y": 3, "X": 5, "H": 24, "C": 3, "S": 4},
        "b16": {"B": 32, "Y": 14, "X": 14, "H": 512, "C": 3, "S": 16},
    },
    odd_shapes=(
        {"B": 1, "Y": 1, "X": 1, "H": 1, "C": 1, "S": 1},
        {"B": 3, "Y": 2, "X": 7, "H": 20, "C": 5, "S": 3},
        {"B": 2, "Y": 5, "X": 2, "H": 33, "C": 3, "S": 14},
        {"B": 1, "Y": 3, "X": 2, "H": 48, "C": 1, "S": 16},
        {"B": 1, "Y": 2, "X": 3, "H": 7, "C": 2, "S": 37},
        {"B": 0, "Y": 2, "X": 3, "H": 8, "C": 3, "S": 8},
    ),
    make_inputs=make_inputs,
    reference=by_argument(reference.patch_unembed),
    eager=eager,
    gradients=("x", "weight", "bias"),
    flops=lambda s: 2.0 * s["B"] * s["Y"] * s["X"] * s["H"] * s["C"] * s["S"] ** 2,
    bytes=_bytes,
)
