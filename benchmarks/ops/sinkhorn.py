"""Upstream's Sinkhorn-Knopp, in the exponential domain.

`sinkhorn_potentials` is timed against it too: upstream writes all assignments to have its targets, this package's
losses take the potentials. Nothing of what follows from the potentials is in that time.
"""

from torch import Tensor

from benchmarks.plain import objectives
from stellar_fast.kernels.sinkhorn.spec import POTENTIALS
from stellar_fast.ops.sinkhorn import SinkhornTargets


def plain(logits: Tensor, temperature: float = 0.06) -> Tensor:
    return objectives.sinkhorn(logits / temperature)


def assignments(potentials: tuple[Tensor, Tensor], logits: Tensor, temperature: float = 0.06) -> Tensor:
    """In fp64, so that the potentials alone are what can be wrong."""
    row, column = potentials
    return SinkhornTargets(row, column, temperature, logits.double()).assignments()


PROVIDERS = {"plain": plain}
FUNCTIONS = {"sinkhorn_potentials": (POTENTIALS, assignments)}
