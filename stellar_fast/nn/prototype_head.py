"""Online-clustering head: MLP, normalisation, prototypes."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

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
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.prototypes = nn.Linear(prototype_dim, num_clusters, bias=False)
        nn.init.normal_(self.prototypes.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to logits (..., C), fp32; the product runs in the autocast dtype."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        features = F.normalize(self.layers[-1](x).float(), dim=-1, eps=NORM_EPS)
        return self.prototypes(features).float()
