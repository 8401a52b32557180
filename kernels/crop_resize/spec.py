"""crop_resize for tests and benchmarks. H x W image, N crops, S output side."""

from typing import Any

import torch
from torch import Tensor

from stellar_fast.kernels.crop_resize import reference
from stellar_fast.registry import OpSpec, Shape


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Noise over a gradient, and boxes of any size inside the image."""
    H, W, N = shape["H"], shape["W"], shape["N"]
    ramp = torch.arange(H * W * 3).view(H, W, 3) * 160 // max(1, H * W * 3)
    image = (ramp + torch.randint(0, 96, (H, W, 3), generator=generator)).to(dtype)
    part = torch.rand(N, 4, generator=generator)
    size = (1 + part[:, 2:] * (torch.tensor([H, W]) - 1)).long()
    corner = (part[:, :2] * (torch.tensor([H, W]) - size + 1)).long()
    flips = torch.rand(N, generator=generator) < 0.5
    return {"image": image, "boxes": torch.cat([corner, size], dim=1), "flips": flips, "size": shape["S"]}


def crop_resize(image: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    out = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    reference.crop_resize(image.numpy(), boxes.numpy(), flips.numpy(), size, out.numpy())
    return out


SPEC = OpSpec(
    name="crop_resize",
    shapes={
        "small": {"H": 37, "W": 53, "N": 3, "S": 16},
        "global": {"H": 375, "W": 500, "N": 8, "S": 224},
        "local": {"H": 375, "W": 500, "N": 8, "S": 96},
    },
    odd_shapes=({"H": 1, "W": 1, "N": 1, "S": 1}, {"H": 61, "W": 7, "N": 5, "S": 33}, {"H": 9, "W": 9, "N": 0, "S": 8}),
    make_inputs=make_inputs,
    reference=crop_resize,
    bytes=lambda s, itemsize: float(3 * s["H"] * s["W"] + 3 * s["N"] * s["S"] ** 2),
    dtypes=(torch.uint8,),
    integer_tolerance=1,
    devices=("cpu",),
)
