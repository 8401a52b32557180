"""add_layer_norm for tests and benchmarks. R rows, D width; autocast 1: all but x is fp32, and the norm as x."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.add_layer_norm import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    R, D = shape["R"], shape["D"]
    sizes = {"x": (R, D), "residual": (R, D), "weight": (D,), "bias": (D,)}
    wide = torch.float32 if shape.get("autocast") else dtype
    tensors = {
        name: draw(generator, *size, dtype=dtype if name == "x" else wide, device=device)
        for name, size in sizes.items()
    }
    return tensors | {"eps": 1e-6} | ({"dtype": dtype} if wide != dtype else {})


def eager(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As modules of torch compute it, the norm cast to what the next product takes."""
    total = x if residual is None else residual + x
    weight, bias = weight.to(total.dtype), bias.to(total.dtype)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps).to(dtype or total.dtype)


def moved_bytes(shape: Shape, itemsize: int) -> float:
    """Both inputs read, both outputs written."""
    stream = 4 if shape.get("autocast") else itemsize
    return float(2 * (itemsize + stream) * shape["R"] * shape["D"] + 2 * stream * shape["D"])


SPEC = OpSpec(
    name="add_layer_norm",
    shapes={
        "small": {"R": 9, "D": 40},  # no multiple of a vector
        "b16": {"R": 2170, "D": 768, "autocast": 1},  # a norm over two images' clean, masked and local views
        "b16_bare": {"R": 2170, "D": 768},
        "b16_gpu": {"R": 32 * 1085, "D": 768, "autocast": 1},  # batch 32
    },
    odd_shapes=({"R": 1, "D": 1}, {"R": 3, "D": 17}, {"R": 2, "D": 768}, {"R": 0, "D": 8}),
    make_inputs=make_inputs,
    reference=by_argument(reference.add_layer_norm),
    eager=eager,
    gradients=("x", "residual", "weight", "bias"),
    flops=lambda s: 9.0 * s["R"] * s["D"],
    bytes=moved_bytes,
)
