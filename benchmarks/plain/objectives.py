"""The losses and their targets, formula by formula.

Letters: N rows (tokens), C prototypes, G image-views, K sparse tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def sinkhorn(logits_NC: Tensor, iterations: int = 3, scale: float = 1.0) -> Tensor:
    """Soft assignments (N, C) fp32 from logits that are already divided by the temperature."""
    scores = logits_NC.float()
    scores = torch.exp(scores + 50 - scores.amax(dim=0, keepdim=True))
    for _ in range(iterations):
        scores = scores / (scores.sum(dim=0, keepdim=True) + 1e-8) ** scale
        scores = scores / (scores.sum(dim=1, keepdim=True) + 1e-8)
    return scores


@torch.no_grad()
def match_tokens(predicted_GKD: Tensor, target_GKD: Tensor, epsilon: float = 0.1, rounds: int = 5) -> Tensor:
    """Index (G, K) of the target token that entropic optimal transport gives to each predicted token."""
    cost = torch.cdist(predicted_GKD.float(), target_GKD.float())
    u, v = cost.new_zeros(cost.shape[:2]), cost.new_zeros(cost.shape[:2])
    for _ in range(rounds):
        u = -epsilon * torch.logsumexp((v[:, None, :] - cost) / epsilon, dim=2)
        v = -epsilon * torch.logsumexp((u[:, :, None] - cost) / epsilon, dim=1)
    plan = torch.exp((u[:, :, None] + v[:, None, :] - cost) / epsilon)
    return plan.argmax(dim=2)


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of -sum_c target_c log_softmax(logits / temperature)_c; (..., C), targets may broadcast."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1).mean()


def koleo(tokens_GKD: Tensor) -> Tensor:
    """Spread of the K tokens of each image: mean of -log(half the distance to the nearest other token)."""
    with torch.autocast(tokens_GKD.device.type, enabled=False):
        x = F.normalize(tokens_GKD.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.transpose(1, 2)
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = similarity.argmax(dim=2)
        neighbour = x.gather(1, nearest[:, :, None].expand_as(x))
        distance = (x - neighbour + 1e-8).norm(dim=-1)
        return -torch.log(0.5 * distance + 1e-8).mean()
