"""token_match for tests and benchmarks. B images, V views, K tokens of width D."""

import torch
from torch import Tensor

from stellar_fast.kernels.token_match import reference
from stellar_fast.registry import OpSpec, Shape, draw


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    B, V, K, D = shape["B"], shape["V"], shape["K"], shape["D"]
    sizes = {"pred": (B, V, K, D), "target": (B, K, D)}
    return {name: draw(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}


def token_match(pred: Tensor, target: Tensor, filter: Tensor | None = None, **options: float) -> Tensor:
    B, V, K, D = pred.shape
    if pred.numel() == 0:
        return torch.zeros(B, V, K, dtype=torch.int64, device=pred.device)
    views = target[:, None].expand(B, V, K, D).flatten(0, 1)
    keep = None if filter is None else filter.repeat_interleave(V, dim=0)
    return reference.token_match(pred.flatten(0, 1), views, keep, **options).view(B, V, K)  # type: ignore[arg-type]


SPEC = OpSpec(
    name="token_match",
    shapes={
        "small": {"B": 2, "V": 3, "K": 4, "D": 8},
        "b16": {"B": 32, "V": 8, "K": 16, "D": 768},
    },
    odd_shapes=(
        {"B": 1, "V": 1, "K": 1, "D": 1},
        {"B": 2, "V": 1, "K": 17, "D": 5},
        {"B": 1, "V": 2, "K": 64, "D": 33},
        {"B": 0, "V": 2, "K": 5, "D": 4},
    ),
    make_inputs=make_inputs,
    reference=token_match,
    flops=lambda s: s["B"] * s["V"] * s["K"] ** 2 * (3.0 * s["D"] + 2 * 5 * 4),
    bytes=lambda s, itemsize: float(s["B"] * s["K"] * (itemsize * s["D"] * (s["V"] + 1) + 8 * s["V"])),
)
