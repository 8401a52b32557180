"""packed_patch_embed for tests and benchmarks: N images in full, and M masked ones of which `kept` patches stay.

S side of the images in pixels, p of a patch, D width, K sparse tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.kernels.packed_patch_embed import reference
from stellar_fast.registry import OpSpec, Shape, draw


def _make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    S, p, D, kept = shape["S"], shape["p"], shape["D"], shape["kept"]
    P = (S // p) ** 2
    images = [torch.rand(n, 3, S, S, generator=generator, dtype=torch.float64) for n in (shape["N"], shape["M"])]
    keep = torch.rand(shape["M"], P, generator=generator).argsort(dim=1)[:, :kept]
    position = 0.02 * draw(generator, 1 + P, D, dtype=dtype, device=device)
    return {
        "images": [view.to(device, dtype) for view in images],
        "weight": 0.02 * draw(generator, D, 3, p, p, dtype=dtype, device=device),
        "bias": draw(generator, D, dtype=dtype, device=device),
        "positions": [position, position],
        "cls_token": draw(generator, D, dtype=dtype, device=device),
        "sparse_tokens": draw(generator, shape["K"], D, dtype=dtype, device=device),
        "mean": torch.tensor([0.485, 0.456, 0.406], dtype=dtype, device=device),
        "std": torch.tensor([0.229, 0.224, 0.225], dtype=dtype, device=device),
        "keep_indices": [None, keep.to(device)],
    }


def eager(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    keep_indices: Sequence[Tensor | None],
) -> Tensor:
    """As modules of torch compute it, the pixels normalised in fp32."""
    packed = []
    for view, position, keep in zip(images, positions, keep_indices, strict=True):
        pixels = ((at_least_fp32(view) - mean[:, None, None]) / std[:, None, None]).to(weight.dtype)
        patches = F.conv2d(pixels, weight, bias, stride=weight.shape[-2:]).flatten(2).mT + position[1:]
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        cls, sparse = (x.expand(len(view), -1, -1) for x in (cls_token + position[:1], sparse_tokens))
        packed.append(torch.cat((cls, patches, sparse), dim=1).flatten(0, 1))
    return torch.cat(packed)


def _rows(shape: Shape) -> int:
    return shape["N"] * (shape["S"] // shape["p"]) ** 2 + shape["M"] * shape["kept"]


def _flops(shape: Shape) -> float:
    return 6.0 * _rows(shape) * shape["p"] ** 2 * shape["D"]


def _bytes(shape: Shape, itemsize: int) -> float:
    tokens = _rows(shape) + (shape["N"] + shape["M"]) * (1 + shape["K"])
    return float(itemsize * (_rows(shape) * 3 * shape["p"] ** 2 + tokens * shape["D"]))


SPEC = OpSpec(
    name="packed_patch_embed",
    shapes={
        "small": {"N": 2, "M": 3, "S": 20, "p": 4, "D": 24, "K": 3, "kept": 5},
        "b16": {"N": 2, "M": 16, "S": 224, "p": 16, "D": 768, "K": 16, "kept": 39},
        "b16_gpu": {"N": 32, "M": 256, "S": 224, "p": 16, "D": 768, "K": 16, "kept": 39},  # batch 32
        "h14": {"N": 2, "M": 16, "S": 224, "p": 14, "D": 1280, "K": 16, "kept": 51},  # no slice divides a patch
    },
    odd_shapes=(
        {"N": 0, "M": 0, "S": 8, "p": 4, "D": 8, "K": 2, "kept": 1},
        {"N": 1, "M": 1, "S": 17, "p": 7, "D": 9, "K": 1, "kept": 3},
    ),
    make_inputs=_make_inputs,
    reference=reference.packed_patch_embed,
    eager=eager,
    gradients=("weight", "bias", "cls_token", "sparse_tokens"),
    flops=_flops,
    bytes=_bytes,
    backward=1.0,  # images have no gradient
)
