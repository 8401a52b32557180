"""Plain torch KoLeo in fp32 (fp64 where given). N images, K tokens, width D."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast

EPS = 1e-8


def koleo(x_NKD: Tensor, min_distance: float = 0.0) -> Tensor:
    """Return the 0-dim fp32 loss; gradients reach both ends of each pair, the choice of pairs has none."""
    with without_autocast(x_NKD):
        x = F.normalize(at_least_fp32(x_NKD), dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = x @ x.mT
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            nearest = similarity.argmax(dim=-1)
        neighbour = x.gather(1, nearest[..., None].expand_as(x))
        distance = torch.linalg.vector_norm(x - neighbour + EPS, dim=-1).clamp_min(min_distance)
        return -torch.log(0.5 * distance + EPS).mean()
