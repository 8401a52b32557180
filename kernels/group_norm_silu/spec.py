"""group_norm_silu for tests and benchmarks. B images, C channels, H x W pixels, G groups.

stats 1: the statistics come along; residual 1: a sum is formed on the way; autocast 1: weight and bias are fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.group_norm_silu import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def statistics(x: Tensor, groups: int) -> Tensor:
    """(B, G, 2) fp32 mean and biased variance."""
    grouped = x.double().unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(-1)
    return torch.stack([mean, (grouped - mean[..., None]).square().mean(-1)], -1).float()


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    B, C, H, W, G = (shape[letter] for letter in "BCHWG")

    def image() -> Tensor:
        return draw(generator, B, C, H, W, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    wide = torch.float32 if shape.get("autocast") else dtype
    x = image()
    weight, bias = (draw(generator, C, dtype=wide, device=device) for _ in range(2))
    inputs = {"x": x, "groups": G, "weight": weight, "bias": bias, "eps": 1e-6}
    if shape.get("stats"):
        inputs["stats"] = statistics(x, G)
    if shape.get("residual"):
        inputs["residual"] = image()
    return inputs


def eager(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As modules compute it.

    F.group_norm itself refuses an image of one value a group, and on a channels-last CPU tensor that needs no gradient
    torch 2.13's backward crashes.
    """
    y = x if residual is None else x + residual
    out = F.silu(torch.group_norm(y.contiguous(), groups, weight.to(y.dtype), bias.to(y.dtype), eps))
    return out if residual is None else (out, y)


def moved_bytes(shape: Shape, itemsize: int) -> float:
    """x read and out written; without statistics x is read twice; a residual is read, and the sum written."""
    passes = (2 if shape.get("stats") else 3) + (2 if shape.get("residual") else 0)
    return float(passes * itemsize * shape["B"] * shape["C"] * shape["H"] * shape["W"])


SPEC = OpSpec(
    name="group_norm_silu",
    shapes={
        "small": {"B": 2, "C": 24, "H": 5, "W": 7, "G": 4},  # no multiple of a vector
        "vqgan_256": {"B": 2, "C": 128, "H": 256, "W": 256, "G": 32},
        "vqgan_256_stats": {"B": 2, "C": 128, "H": 256, "W": 256, "G": 32, "stats": 1},
        "vqgan_256_residual": {"B": 2, "C": 128, "H": 256, "W": 256, "G": 32, "residual": 1},
        "vqgan_256_one": {"B": 1, "C": 128, "H": 256, "W": 256, "G": 32},  # 33 MB in fp32
        "vqgan_256_one_stats": {"B": 1, "C": 128, "H": 256, "W": 256, "G": 32, "stats": 1},
        "vqgan_64": {"B": 4, "C": 256, "H": 64, "W": 64, "G": 32},
        "vqgan_64_stats": {"B": 4, "C": 256, "H": 64, "W": 64, "G": 32, "stats": 1},
    },
    odd_shapes=(
        {"B": 3, "C": 7, "H": 3, "W": 1, "G": 7},
        {"B": 1, "C": 5, "H": 1, "W": 9, "G": 1, "residual": 1},
        {"B": 2, "C": 6, "H": 1, "W": 1, "G": 2, "stats": 1},
        {"B": 2, "C": 4, "H": 1, "W": 1, "G": 4},  # one value a group
        {"B": 1, "C": 1, "H": 33, "W": 40, "G": 1, "stats": 1},  # more than one chunk of pixels
        {"B": 1, "C": 96, "H": 31, "W": 29, "G": 32, "residual": 1, "autocast": 1},
        {"B": 1, "C": 2064, "H": 3, "W": 3, "G": 3},  # more channels than threads of a block read at a time
        {"B": 0, "C": 8, "H": 3, "W": 2, "G": 2},
        {"B": 0, "C": 8, "H": 3, "W": 2, "G": 2, "residual": 1},
    ),
    make_inputs=make_inputs,
    reference=by_argument(reference.group_norm_silu),
    eager=eager,
    gradients=("x", "residual", "weight", "bias"),
    flops=lambda s: 12.0 * s["B"] * s["C"] * s["H"] * s["W"],
    bytes=moved_bytes,
)
