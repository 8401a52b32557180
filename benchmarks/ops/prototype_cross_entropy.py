"""Upstream's soft cross-entropy over gathered targets; torch's own for soft targets as the library's way."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain import objectives


def plain(logits: Tensor, targets: Tensor, index: Tensor, temperature: float = 0.12) -> Tensor:
    return objectives.soft_cross_entropy(logits, targets[index], temperature)


def cross_entropy(logits: Tensor, targets: Tensor, index: Tensor, temperature: float = 0.12) -> Tensor:
    return F.cross_entropy(logits.float() / temperature, targets[index].float())


PROVIDERS = {"plain": plain, "torch.cross_entropy": cross_entropy}
