"""The order of training: the same for any number of worker processes, resumable in mid-epoch."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stellar_fast.data.transform import MultiViewTransform

Key = tuple[int, int]  # epoch, index


def stable_seed(*values: int) -> int:
    """A 63-bit seed that depends on all values and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1


class Images(Protocol):
    """What a dataset of views is made of, such as an `ImageFolder` without labels."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class MultiViewDataset(Dataset[dict[str, Tensor]]):
    """Views of images by (epoch, index): the same key gives the same views in any process and order.

    Args:
        folder: images by index.
        transform: (image, seed) -> views.
        seed: of the run.
    """

    def __init__(self, folder: Images | Sequence[Image.Image], transform: MultiViewTransform, seed: int = 0):
        self.folder = folder
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, index = key
        return self.transform(self.folder[index], stable_seed(self.seed, epoch, index))


class EpochSampler(Sampler[list[Key]]):
    """Batches of (epoch, index), shuffled anew each epoch; the ranks take disjoint shares of the same order.

    One iteration gives the rest of the current epoch and moves to the next one. `state_dict` counts the batches given
    out; a DataLoader with workers asks for them ahead of their use, so its user counts for itself and resumes by
    `load_state_dict({"epoch": ..., "batch": ...})`.

    Args:
        num_samples: size of the dataset.
        batch_size: samples a batch and rank.
        seed: of the order.
        rank, world_size: this process among all.
        drop_last: leave out what does not fill a batch on every rank; otherwise the last batches are smaller, and the
            order's start is repeated so that all ranks have equally many samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 but is {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size) but is {rank} of {world_size}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        if self.drop_last:
            return self.num_samples // (self.batch_size * self.world_size)
        share = -(-self.num_samples // self.world_size)
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        if not self.drop_last:
            order += order[: -len(order) % self.world_size]
        mine = order[self.rank :: self.world_size]
        epoch = self.epoch
        while self.batch < len(self):
            start = self.batch * self.batch_size
            self.batch += 1
            yield [(epoch, index) for index in mine[start : start + self.batch_size]]
        self.epoch, self.batch = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The place in the run: epoch, and batches given out in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at `epoch` and `batch`; ValueError where such an epoch has no such batch."""
        if state["epoch"] < 0 or not 0 <= state["batch"] <= len(self):
            raise ValueError(f"no place like {state} in epochs of {len(self)} batches")
        self.epoch, self.batch = state["epoch"], state["batch"]
