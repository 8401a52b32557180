"""token_match: which target token each predicted token learns from."""

import torch
from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.token_match import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes


def token_match(
    pred: Tensor, target: Tensor, *, filter: Tensor | None = None, epsilon: float = 0.1, iterations: int = 5
) -> Tensor:
    """Match the tokens of V views of an image to the image's target tokens by entropic optimal transport.

    Args:
        pred: (B, V, K, D) floating.
        target: (B, K, D) floating.
        filter: (B, K), 1 keeps a target, 0 sets its cost to twice the largest cost of the batch (it can still be
            chosen).
        epsilon: entropy weight, in units of the Euclidean distance.
        iterations: rounds of dual updates.

    Returns:
        index (B, V, K) int64 in 0..K-1, not one-to-one; ties take the lowest index; no gradient.

    Raises:
        ValueError: shapes that do not fit together, integer tokens, an epsilon or iterations that are not positive.

    Source: Sinkhorn distances (arXiv 1306.0895) as used by STELLAR (arXiv 2602.01905).
    """
    backend.pick("token_match", pred.device.type)
    shapes = {"pred": (pred, "BVKD"), "target": (target, "BKD")}
    check_shapes(**shapes if filter is None else shapes | {"filter": (filter, "BK")})
    check_floating(pred=pred, target=target)
    check_positive(epsilon=epsilon, iterations=iterations)
    B, V, K, _ = pred.shape
    if pred.numel() == 0:
        return torch.zeros(B, V, K, dtype=torch.int64, device=pred.device)
    image = torch.arange(B, device=pred.device).repeat_interleave(V)
    keep = None if filter is None else filter[image]
    return reference.token_match(pred.flatten(0, 1), target[image], keep, epsilon, iterations).view(B, V, K)
