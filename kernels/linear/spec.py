"""linear for tests and benchmarks. R rows, I input width, O output width; gelu_input, gelu_output: 1 for that GELU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.linear import reference
from stellar_fast.registry import OpSpec, Shape, by_argument, draw


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    R, I, O = shape["R"], shape["I"], shape["O"]  # noqa: E741
    sizes = {"x": (R, I), "weight": (O, I), "bias": (O,)}
    tensors = {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}
    sides = [side for side in ("input", "output") if shape.get(f"gelu_{side}")]
    return tensors | ({"gelu": sides[0]} if sides else {})


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str | None = None) -> Tensor:
    """As a module of torch computes it."""
    out = F.linear(F.gelu(x) if gelu == "input" else x, weight, bias)
    return F.gelu(out) if gelu == "output" else out


SPEC = OpSpec(
    name="linear",
    shapes={
        "small": {"R": 70, "I": 130, "O": 190},  # large enough for oneDNN, no width a multiple of 16
        "b16": {"R": 2170, "I": 768, "O": 3072},  # the MLP over two images' clean, masked and local views
        "b16_down": {"R": 2170, "I": 3072, "O": 768},
        "b16_gelu_input": {"R": 2170, "I": 3072, "O": 768, "gelu_input": 1},
        "b16_gelu_output": {"R": 2170, "I": 768, "O": 3072, "gelu_output": 1},
        "b16_qkv": {"R": 2170, "I": 768, "O": 2304},
        "b16_proj": {"R": 2170, "I": 768, "O": 768},
        "b16_encode": {"R": 1704, "I": 768, "O": 3072},  # eight images of 213 tokens
    },
    odd_shapes=({"R": 1, "I": 2048, "O": 1024}, {"R": 3, "I": 5, "O": 7}, {"R": 0, "I": 8, "O": 4}),
    make_inputs=make_inputs,
    reference=by_argument(reference.linear),
    eager=eager,
    gradients=("x", "weight", "bias"),
    flops=lambda s: 2.0 * s["R"] * s["I"] * s["O"],
    bytes=lambda s, itemsize: float(itemsize * (s["R"] * (s["I"] + s["O"]) + s["O"] * (s["I"] + 1))),
)
