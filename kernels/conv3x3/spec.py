"""conv3x3 for tests and benchmarks. B images, C input, O output channels, H x W pixels, G groups, R = 1: a residual."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.conv3x3 import reference
from stellar_fast.registry import OpSpec, Shape, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Channels last in memory; the weight as torch draws it."""
    B, C, O, H, W = (shape[letter] for letter in "BCOHW")  # noqa: E741
    weight = draw(generator, O, C, 3, 3, dtype=torch.float64, device=device) / math.sqrt(9 * C)
    inputs: dict[str, Any] = {
        "x": draw(generator, B, C, H, W, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last),
        "weight": weight.to(dtype),
        "bias": draw(generator, O, dtype=dtype, device=device),
    }
    if shape["R"]:
        residual = draw(generator, B, O, H, W, dtype=dtype, device=device)
        inputs["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return inputs | ({"stats_groups": shape["G"]} if shape["G"] else {})


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    return _with_statistics(reference.conv3x3(x, weight, bias, residual), stats_groups)


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As torch computes it."""
    out = F.conv2d(x, weight, bias, padding=1)
    return _with_statistics(out if residual is None else out + residual, stats_groups)


def _with_statistics(out: Tensor, groups: int | None) -> Tensor | tuple[Tensor, Tensor]:
    return out if groups is None else (out, statistics(out, groups))


def _flops(shape: Shape) -> float:
    """Of the plain formula."""
    return 2.0 * 9 * shape["B"] * shape["H"] * shape["W"] * shape["C"] * shape["O"]


def _bytes(shape: Shape, itemsize: int) -> float:
    B, C, O, H, W = (shape[letter] for letter in "BCOHW")  # noqa: E741
    return float(itemsize * (B * H * W * (C + O * (1 + shape["R"])) + 9 * C * O + O) + 8 * B * shape["G"])


SPEC = OpSpec(
    name="conv3x3",
    shapes={
        "small": {"B": 2, "C": 20, "O": 24, "H": 5, "W": 7, "G": 4, "R": 1},
        "vqgan_256": {"B": 1, "C": 128, "O": 128, "H": 256, "W": 256, "G": 32, "R": 0},
        "vqgan_128": {"B": 2, "C": 128, "O": 128, "H": 128, "W": 128, "G": 32, "R": 0},
        "vqgan_64": {"B": 2, "C": 256, "O": 256, "H": 64, "W": 64, "G": 32, "R": 0},
        "vqgan_32": {"B": 2, "C": 256, "O": 256, "H": 32, "W": 32, "G": 32, "R": 0},
        "vqgan_16": {"B": 2, "C": 512, "O": 512, "H": 16, "W": 16, "G": 32, "R": 0},
        "vqgan_first": {"B": 1, "C": 3, "O": 128, "H": 256, "W": 256, "G": 32, "R": 0},
        "vqgan_last": {"B": 1, "C": 128, "O": 3, "H": 256, "W": 256, "G": 0, "R": 0},
    },
    odd_shapes=(
        {"B": 1, "C": 1, "O": 1, "H": 1, "W": 1, "G": 1, "R": 0},
        {"B": 3, "C": 17, "O": 5, "H": 1, "W": 13, "G": 5, "R": 1},
        {"B": 2, "C": 3, "O": 70, "H": 11, "W": 3, "G": 0, "R": 0},
        {"B": 1, "C": 150, "O": 96, "H": 22, "W": 31, "G": 3, "R": 0},  # channels in two steps, tiles in two runs
        {"B": 0, "C": 4, "O": 8, "H": 3, "W": 2, "G": 2, "R": 1},
    ),
    make_inputs=make_inputs,
    reference=_reference,
    eager=eager,
    gradients=("x", "weight", "bias", "residual"),
    flops=_flops,
    bytes=_bytes,
)
