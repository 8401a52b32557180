"""Plain torch prototype cross-entropy in fp32 (fp64 where given). R predictions, T targets, C prototypes."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def prototype_cross_entropy(
    logits_RC: Tensor, targets_TC: Tensor, index_R: Tensor | None = None, temperature: float = 0.12
) -> Tensor:
    """Return the 0-dim fp32 loss; `index` names the target row that each prediction learns."""
    with torch.autocast(logits_RC.device.type, enabled=False):
        targets = targets_TC.detach() if index_R is None else targets_TC.detach()[index_R]
        log_probability = torch.log_softmax(at_least_fp32(logits_RC) / temperature, dim=-1)
        return -(targets * log_probability).sum(dim=-1).mean()
