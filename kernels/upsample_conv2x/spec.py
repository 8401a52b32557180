"""upsample_conv2x for tests and benchmarks. B images, C input, O output channels, H x W input pixels, G groups."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.upsample_conv2x import reference
from stellar_fast.registry import OpSpec, Shape, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Channels last in memory, as a decoder keeps its images; the weight as torch draws it."""
    B, C, O, H, W = (shape[letter] for letter in "BCOHW")  # noqa: E741
    scale = 1 / math.sqrt(9 * C)
    x = draw(generator, B, C, H, W, dtype=dtype, device=device)
    weight = draw(generator, O, C, 3, 3, dtype=torch.float64, device=device)
    tensors = {"x": x.contiguous(memory_format=torch.channels_last), "weight": (scale * weight).to(dtype)}
    bias = draw(generator, O, dtype=dtype, device=device)
    return tensors | {"bias": bias} | ({"stats_groups": shape["G"]} if shape["G"] else {})


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stats_groups: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    return _with_statistics(reference.upsample_conv2x(x, weight, bias), stats_groups)


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stats_groups: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As modules of torch compute it."""
    out = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    return _with_statistics(out, stats_groups)


def _with_statistics(out: Tensor, groups: int | None) -> Tensor | tuple[Tensor, Tensor]:
    return out if groups is None else (out, statistics(out, groups))


def _flops(shape: Shape) -> float:
    """Of the four phases' 2x2 convolutions."""
    return 2.0 * 16 * shape["B"] * shape["H"] * shape["W"] * shape["C"] * shape["O"]


def _bytes(shape: Shape, itemsize: int) -> float:
    B, C, O, H, W = (shape[letter] for letter in "BCOHW")  # noqa: E741
    return float(itemsize * (B * H * W * (C + 4 * O) + 9 * C * O + O) + 8 * B * shape["G"])


SPEC = OpSpec(
    name="upsample_conv2x",
    shapes={
        "small": {"B": 2, "C": 20, "O": 24, "H": 5, "W": 7, "G": 4},
        "vqgan_128": {"B": 4, "C": 128, "O": 128, "H": 128, "W": 128, "G": 32},
        "vqgan_64": {"B": 4, "C": 256, "O": 256, "H": 64, "W": 64, "G": 32},
        "vqgan_16": {"B": 2, "C": 512, "O": 512, "H": 16, "W": 16, "G": 32},
    },
    odd_shapes=(
        {"B": 1, "C": 1, "O": 1, "H": 1, "W": 1, "G": 1},
        {"B": 3, "C": 17, "O": 5, "H": 1, "W": 13, "G": 5},
        {"B": 2, "C": 3, "O": 70, "H": 11, "W": 3, "G": 0},
        {"B": 1, "C": 8, "O": 96, "H": 3, "W": 131, "G": 3},  # wider than a tile
        {"B": 0, "C": 4, "O": 8, "H": 3, "W": 2, "G": 2},
    ),
    make_inputs=make_inputs,
    reference=_reference,
    eager=eager,
    gradients=("x", "weight", "bias"),
    flops=_flops,
    bytes=_bytes,
)
