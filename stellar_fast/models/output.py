"""What the encoder returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

KEYS = ("cls", "sparse", "dense", "spatial", "lowrank", "peak_dist", "concat")


@dataclass(frozen=True, eq=False)
class StellarOutput(Mapping[str, Tensor]):
    """Features of B images, by attribute and by key. K sparse tokens, P patches, D width.

    Attributes:
        cls: (B, 1, D).
        sparse: (B, K, D), the "what".
        dense: (B, P, D), one vector a patch.
        spatial: (B, P, K), the "where": each patch is a distribution over the tokens.
        lowrank: (B, P, D) = spatial @ sparse.
        peak_dist: (B, K), the largest value of each token's column of `spatial`; no gradient.
        grid: patches in height and width; not a key.

    Without gradient each tensor owns its memory; in training some are views of one that holds them all.
    """

    cls: Tensor
    sparse: Tensor
    dense: Tensor
    spatial: Tensor
    lowrank: Tensor
    peak_dist: Tensor
    grid: tuple[int, int]

    @property
    def concat(self) -> Tensor:
        """(B, K, D + P): `sparse` beside `spatial` transposed."""
        return torch.cat((self.sparse, self.spatial.mT.to(self.sparse.dtype)), dim=-1)

    __eq__ = object.__eq__  # a Mapping would compare the tensors
    __hash__ = object.__hash__

    def __getitem__(self, key: str) -> Tensor:
        if key not in KEYS:
            raise KeyError(f"{key!r} is not one of {', '.join(KEYS)}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)


_TENSORS = ("cls", "sparse", "dense", "spatial", "lowrank", "peak_dist")
# torch.compile, DDP and FSDP look for the tensors of an output through pytree
pytree.register_pytree_node(
    StellarOutput,
    lambda output: ([getattr(output, name) for name in _TENSORS], output.grid),
    lambda tensors, grid: StellarOutput(**dict(zip(_TENSORS, tensors, strict=True)), grid=tuple(grid)),
    serialized_type_name="stellar_fast.StellarOutput",
)
