"""sinkhorn: balanced soft assignment of tokens to prototypes."""

import torch.distributed as dist
from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.sinkhorn import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes


def sinkhorn_knopp(
    logits: Tensor,
    *,
    temperature: float = 0.06,
    iterations: int = 3,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sinkhorn-Knopp assignments of R tokens to C prototypes, without gradient.

    Args:
        logits: (R, C) floating, tokens by prototypes; with `group` this rank's rows.
        temperature: divides the logits.
        iterations: rounds of column and row scaling.
        scale: exponent of the column sums (`sk_scale`); 1 balances the prototypes fully.
        group: process group whose ranks hold the other rows; column maxima and sums are exchanged.

    Returns:
        (R, C) fp32; after the last round every row sums to one but for the 1e-8 in its divisor.

    Raises:
        ValueError: not a matrix, an integer matrix, a number that is not positive, no rows.

    Source: SwAV (arXiv 2006.09882) with STELLAR's shift and scale (arXiv 2602.01905).
    """
    backend.pick("sinkhorn", logits.device.type)
    check_shapes(logits=(logits, "RC"))
    check_floating(logits=logits)
    if not logits.shape[0]:
        raise ValueError("logits has 0 rows: nothing to assign")
    check_positive(temperature=temperature, iterations=iterations, scale=scale)
    return reference.sinkhorn_knopp(logits, temperature, iterations, scale, group)
