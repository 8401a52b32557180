"""Upstream's KoLeo loss."""

from torch import Tensor

from benchmarks.plain import objectives


def plain(x: Tensor) -> Tensor:
    return objectives.koleo(x)


PROVIDERS = {"plain": plain}
