"""Plain torch prototype cross-entropy in fp32 (fp64 where given), with every (R, C) matrix that the others do without.

R predictions, T targets, C prototypes, E prototype width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def prototype_cross_entropy(
    features_RE: Tensor,
    prototypes_CE: Tensor,
    targets: Any,
    index_R: Tensor | None = None,
    temperature: float = 0.12,
    split_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Return the 0-dim fp32 loss; `targets` are SinkhornTargets or classes (T,), `index` names each prediction's.

    With `split_sizes` one loss a run of so many consecutive predictions, (N,).
    """
    with without_autocast(features_RE):
        logits = at_least_fp32(features_RE) @ at_least_fp32(prototypes_CE).mT
        log_probability = torch.log_softmax(logits / temperature, dim=-1)
        target = dense_targets(targets, len(prototypes_CE), logits.dtype)
        if index_R is not None:
            target = target[index_R]
        losses = -(target * log_probability).sum(dim=-1)
        return losses.mean() if split_sizes is None else means(losses, split_sizes)


def means(losses: Tensor, split_sizes: Sequence[int]) -> Tensor:
    """The mean of each run of rows, (N,)."""
    return torch.stack([run.mean() for run in losses.split(list(split_sizes))])


def dense_targets(targets: Any, num_prototypes: int, dtype: torch.dtype) -> Tensor:
    """The targets as a (T, C) matrix."""
    if isinstance(targets, Tensor):
        return F.one_hot(targets, num_prototypes).to(dtype)
    return targets.assignments().to(dtype).detach()
