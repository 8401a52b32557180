"""Plain torch Sinkhorn-Knopp in fp32 (fp64 where given), in the exponential domain. R rows, C columns."""

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
    """Return assignments (R, C) fp32 without gradient; with `group`, R is this rank's share of the rows."""
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
