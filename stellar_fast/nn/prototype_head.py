"""Online-clustering head: MLP, normalisation, prototypes."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.nn.linear import Linear

NORM_EPS = 1e-7


class PrototypeHead(nn.Module):
    """Tokens to prototype logits: MLP -> L2-normalise -> bias-free linear with weights drawn N(0, 1)."""

    def __init__(
        self, dim: int, hidden_dim: int = 2048, prototype_dim: int = 256, num_clusters: int = 16384, num_layers: int = 2
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"predictor_layers must be at least 1 but is {num_layers}")
        widths = [dim, *[hidden_dim] * (num_layers - 1), prototype_dim]
        self.layers = nn.ModuleList(Linear(i, o) for i, o in pairwise(widths))
        self.prototypes = Linear(prototype_dim, num_clusters, bias=False)
        nn.init.normal_(self.prototypes.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to logits (..., C), fp32; the product runs in the autocast dtype."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        features = F.normalize(at_least_fp32(self.layers[-1](x)), dim=-1, eps=NORM_EPS)
        return at_least_fp32(self.prototypes(features.to(self.prototypes.weight.dtype)))
