"""Plain torch token matching in fp32 (fp64 where given). B images, V views, K tokens of width D on either side."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def transport_plan(
    pred_BVKD: Tensor,
    target_BKD: Tensor,
    filter_BK: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """Return the plan (B, V, K, K) fp32; rows are predictions, columns targets. Without V it is one view an image."""
    pred_BQD, target_BKD = at_least_fp32(pred_BVKD.flatten(1, -2)), at_least_fp32(target_BKD)
    cost = torch.cdist(pred_BQD, target_BKD, compute_mode="donot_use_mm_for_euclid_dist")
    cost = cost.view(*pred_BVKD.shape[:-1], target_BKD.shape[1])
    if filter_BK is not None and cost.numel():
        keep = filter_BK.view(len(cost), *(1,) * (cost.dim() - 2), -1).bool()
        cost = torch.where(keep, cost, 2 * cost.amax())
    u, v = torch.zeros_like(cost[..., :1]), torch.zeros_like(cost[..., :1, :])
    for _ in range(iterations):
        u = -epsilon * torch.logsumexp((v - cost) / epsilon, dim=-1, keepdim=True)
        v = -epsilon * torch.logsumexp((u - cost) / epsilon, dim=-2, keepdim=True)
    return torch.exp((u + v - cost) / epsilon)


def token_match(
    pred_BVKD: Tensor,
    target_BKD: Tensor,
    filter_BK: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the target index of each predicted token, (B, V, K) int64, and the plan; ties take the lowest index."""
    with torch.no_grad(), without_autocast(pred_BVKD):
        plan = transport_plan(pred_BVKD, target_BKD, filter_BK, epsilon, iterations)
        index = plan.argmax(dim=-1)
    return (index, plan) if return_plan else index
