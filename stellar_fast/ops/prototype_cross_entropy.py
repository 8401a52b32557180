"""prototype_cross_entropy: soft-target cross-entropy over the prototypes."""

import torch
from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.prototype_cross_entropy import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes


def prototype_cross_entropy(
    logits: Tensor, targets: Tensor, *, index: Tensor | None = None, temperature: float = 0.12
) -> Tensor:
    """Mean over predictions of ``-sum_c targets_c log_softmax(logits / temperature)_c``.

    Args:
        logits: (R, C) floating predictions.
        targets: (T, C) floating assignments; T = R without `index`. No gradient reaches them, and rows need not sum to
            one.
        index: (R,) int64, the target row that each prediction learns.
        temperature: divides the logits.

    Returns:
        0-dim fp32 loss.

    Raises:
        ValueError: shapes that do not fit together, integer logits, a temperature that is not positive.

    Source: STELLAR (arXiv 2602.01905), online clustering.
    """
    backend.pick("prototype_cross_entropy", logits.device.type)
    if index is None:
        check_shapes(logits=(logits, "RC"), targets=(targets, "RC"))
    else:
        check_shapes(logits=(logits, "RC"), targets=(targets, "TC"), index=(index, "R"))
        if index.dtype != torch.int64:
            raise ValueError(f"index must be torch.int64 but is {index.dtype}")
    check_floating(logits=logits, targets=targets)
    check_positive(temperature=temperature)
    return reference.prototype_cross_entropy(logits, targets, index, temperature)
