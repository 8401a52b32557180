"""Plain torch Sinkhorn-Knopp in fp32 (fp64 where given). R rows, C columns.

`sinkhorn_knopp` is the formula as it is published, in the exponential domain; `sinkhorn_potentials` never leaves the
log domain. With `group`, R is this rank's share of the rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32

SUM_EPS = 1e-8
PEAK = 50.0  # every column is shifted so that its largest exponent is 50: exp(50) is far from overflow in fp32


def sinkhorn_knopp(
    logits_RC: Tensor,
    temperature: float = 0.06,
    iterations: int = 3,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return assignments (R, C) without gradient."""
    scores = at_least_fp32(logits_RC.detach()) / temperature
    column_max = scores.amax(dim=0)
    if group is not None:
        dist.all_reduce(column_max, op=dist.ReduceOp.MAX, group=group)
    scores = torch.exp(scores + PEAK - column_max)
    for _ in range(iterations):
        column_sum = scores.sum(dim=0)
        if group is not None:
            dist.all_reduce(column_sum, group=group)
        scores = scores / (column_sum + SUM_EPS) ** scale
        scores = scores / (scores.sum(dim=1, keepdim=True) + SUM_EPS)
    return scores


def sinkhorn_potentials(
    logits_RC: Tensor,
    temperature: float = 0.06,
    iterations: int = 3,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
    statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Return row (R,) and column (C,) without gradient; with `statistics` also entropy and first choice, (R,) each."""
    scores = at_least_fp32(logits_RC.detach()) / temperature
    peak = scores.amax(dim=0)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = (scores - peak).exp().sum(dim=0)
    if group is not None:
        dist.all_reduce(sums, group=group)
    column, row = first_column(peak, sums, scale), scores.new_zeros(scores.shape[0], 1)
    for i in range(iterations):
        if i:
            sums = (scores + column + row).exp().sum(dim=0)
            if group is not None:
                dist.all_reduce(sums, group=group)
            column = next_column(column, sums, scale)
        row = row - ((scores + column + row).exp().sum(dim=1, keepdim=True) + SUM_EPS).log()
    if not statistics:
        return row[:, 0], column
    logs = scores + column + row
    return row[:, 0], column, -(logs.exp() * logs).sum(dim=1), (scores + column).argmax(dim=1)


def first_column(peak: Tensor, sums: Tensor, scale: float) -> Tensor:
    """Column potentials after the first column step; `sums` are of exp(scores - peak), at least one each.

    The largest exponent is 50 there, beside which the 1e-8 is nothing in fp64 either.
    """
    return PEAK * (1 - scale) - peak - scale * sums.log()


def next_column(column: Tensor, sums: Tensor, scale: float) -> Tensor:
    """Column potentials after a later column step; `sums` are those of the assignments so far."""
    return column - scale * (sums + SUM_EPS).log()
