"""Plain torch token matching in fp32 (fp64 where given). N problems, K tokens of width D on either side."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def transport_plan(
    pred_NKD: Tensor,
    target_NKD: Tensor,
    filter_NK: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """Return the plan (N, K, K) fp32; rows are predictions, columns targets."""
    cost = torch.cdist(at_least_fp32(pred_NKD), at_least_fp32(target_NKD), compute_mode="donot_use_mm_for_euclid_dist")
    if filter_NK is not None:
        cost = torch.where(filter_NK[:, None, :].bool(), cost, 2 * cost.amax())
    v = cost.new_zeros(cost.shape[0], 1, cost.shape[2])
    u = cost.new_zeros(cost.shape[0], cost.shape[1], 1)
    for _ in range(iterations):
        u = -epsilon * torch.logsumexp((v - cost) / epsilon, dim=2, keepdim=True)
        v = -epsilon * torch.logsumexp((u - cost) / epsilon, dim=1, keepdim=True)
    return torch.exp((u + v - cost) / epsilon)


def token_match(
    pred_NKD: Tensor,
    target_NKD: Tensor,
    filter_NK: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """Return the target index of each predicted token, (N, K) int64; ties take the lowest index."""
    with torch.no_grad(), torch.autocast(pred_NKD.device.type, enabled=False):
        return transport_plan(pred_NKD, target_NKD, filter_NK, epsilon, iterations).argmax(dim=-1)
