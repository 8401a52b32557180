"""Upstream's Sinkhorn-Knopp, in the exponential domain."""

from torch import Tensor

from benchmarks.plain import objectives


def plain(logits: Tensor, temperature: float = 0.06) -> Tensor:
    return objectives.sinkhorn(logits / temperature)


PROVIDERS = {"plain": plain}
