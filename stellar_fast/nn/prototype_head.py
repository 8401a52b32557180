"""Online-clustering head: MLP, normalisation, prototypes, and what is learned from them. T tokens, C prototypes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.kernels.prototype_cross_entropy.reference import dense_targets, means
from stellar_fast.nn.linear import Linear, linear_of_gelu
from stellar_fast.nn.plain import input_dtype, is_plain
from stellar_fast.ops.checks import autocast_dtype
from stellar_fast.ops.prototype_cross_entropy import prototype_cross_entropy
from stellar_fast.ops.sinkhorn import SinkhornTargets, near_their_peaks, sinkhorn_potentials

NORM_EPS = 1e-7


class Assignment(NamedTuple):
    """Balanced targets of T tokens, and for each the entropy (nats) and the first choice (int64) of its row."""

    targets: SinkhornTargets
    entropy: Tensor
    first: Tensor

    def metrics(self) -> tuple[Tensor, Tensor]:
        """Mean entropy of the targets, and how many prototypes are some token's first choice."""
        used = torch.zeros_like(self.targets.column).scatter_(0, self.first, 1.0)
        return self.entropy.mean(), used.sum()


class PrototypeHead(nn.Module):
    """Tokens to prototypes: MLP -> L2-normalise -> bias-free linear with weights drawn N(0, 1).

    `assign` makes targets, `cross_entropy` learns them; both take what `features` gives. Neither the logits of the
    predictions nor their targets are ever whole in memory. Calling the head gives logits, for a look at them.

    All three run inside of a call of the module, and so does FSDP2's gathering of the weights: a head may be sharded
    on its own, a teacher's as its student's. Each of them gathers, unless sharded with `reshard_after_forward=False`.

    Args:
        dim: width of the tokens.
        hidden_dim: of the MLP.
        prototype_dim: E, width of features and prototypes.
        num_clusters: C.
        num_layers: linears of the MLP.
        temperature: of the predictions.
        sinkhorn: `temperature`, `iterations` and `scale` of the targets.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 2048,
        prototype_dim: int = 256,
        num_clusters: int = 16384,
        num_layers: int = 2,
        *,
        temperature: float = 0.12,
        sinkhorn: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"predictor_layers must be at least 1 but is {num_layers}")
        widths = [dim, *[hidden_dim] * (num_layers - 1), prototype_dim]
        self.layers = nn.ModuleList(Linear(i, o) for i, o in pairwise(widths))
        self.prototypes = Linear(prototype_dim, num_clusters, bias=False)
        self.temperature, self.sinkhorn = temperature, sinkhorn or {}
        nn.init.normal_(self.prototypes.weight)

    def forward(self, x: Tensor, work: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map (..., D) to logits (..., C), fp32; the product runs in the autocast dtype. `work` takes its place."""
        return self._logits(self._features(x)) if work is None else work(x)

    def features(self, x: Tensor) -> Tensor:
        """Map (..., D) to normalised features (..., E), at least fp32."""
        return self(x, self._features)

    def _features(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = linear_of_gelu(layer, x)
        return F.normalize(at_least_fp32(x), dim=-1, eps=NORM_EPS)

    @torch.no_grad()
    def assign(self, features: Tensor) -> Assignment:
        """Sinkhorn-Knopp targets of features (..., E), over the joined rows of all ranks, without gradient."""
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        group = dist.group.WORLD if distributed else None
        logits = self(features, self._logits).flatten(0, -2)
        row, column, entropy, first = sinkhorn_potentials(logits, group=group, statistics=True, **self.sinkhorn)
        nearer = near_their_peaks(logits, column, group)
        if nearer is not None:  # the targets are formed again from logits and potentials
            logits = nearer[0]
            row, column, entropy, first = sinkhorn_potentials(logits, group=group, statistics=True, **self.sinkhorn)
        targets = SinkhornTargets(row, column, self.sinkhorn.get("temperature", 0.06), logits=logits)
        return Assignment(targets, entropy, first)

    def cross_entropy(
        self,
        features: Tensor,
        targets: SinkhornTargets,
        index: Tensor | None = None,
        split_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean loss of R features (..., E); `index` (R,) says which of the T targets each learns, if not its own.

        With `split_sizes` the mean of each run of so many features, (N,). Prototypes that somebody wrapped, replaced or
        hooked are called: their logits (R, C) and the targets are then whole in memory.
        """

        def loss(rows: Tensor) -> Tensor:
            if is_plain(self.prototypes, Linear) and self.prototypes.bias is None:
                return prototype_cross_entropy(
                    rows,
                    self.prototypes.weight,
                    targets,
                    index=index,
                    temperature=self.temperature,
                    split_sizes=split_sizes,
                )
            logits = self._logits(rows)
            assignments = dense_targets(targets, logits.shape[1], logits.dtype)
            learned = assignments if index is None else assignments[index]
            losses = F.cross_entropy(logits / self.temperature, learned, reduction="none")
            return losses.mean() if split_sizes is None else means(losses, split_sizes)

        return self(features.flatten(0, -2), loss)

    def _logits(self, features: Tensor) -> Tensor:
        """In at least fp32; the product is too where it would be in fp16, which holds nothing above 65,504."""
        features = features.to(input_dtype(self.prototypes, features))
        device = features.device
        with torch.autocast(device.type, enabled=False) if autocast_dtype(device) == torch.float16 else nullcontext():
            return at_least_fp32(self.prototypes(features))
