"""The order of training: the same for any number of worker processes, resumable in mid-epoch."""

import contextlib
import errno
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stellar_fast.data.folder import TooManyUnreadable
from stellar_fast.data.transform import MultiViewTransform

Key = tuple[int, int]  # epoch, index

END_S = 5.0  # in which workers that are not needed any more may end by themselves


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
        order = torch.randperm(self.num_samples, generator=generator)
        if not self.drop_last:
            order = torch.cat([order, order[: -len(order) % self.world_size]])
        mine = order[self.rank :: self.world_size]
        epoch = self.epoch
        while self.batch < len(self):
            start = self.batch * self.batch_size
            self.batch += 1
            yield [(epoch, index) for index in mine[start : start + self.batch_size].tolist()]
        self.epoch, self.batch = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The place in the run: epoch, and batches given out in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at `epoch` and `batch`; ValueError where such an epoch has no such batch."""
        if state["epoch"] < 0 or not 0 <= state["batch"] <= len(self):
            raise ValueError(f"no place like {state} in epochs of {len(self)} batches")
        self.epoch, self.batch = state["epoch"], state["batch"]


def _quietly(function: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        function()


class WorkersLost(RuntimeError):
    """Worker processes could not start, ended, or could not hand over what they read."""


class EndlessBatches(Iterator[dict[str, Tensor]]):
    """A loader's batches, epoch after epoch, until `close`, which ends its worker processes within seconds.

    Raises:
        TooManyUnreadable: as the folder says it, without the worker's traceback.
        WorkersLost: in one sentence, with the option that helps.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._batches: Any = None
        self._child_handler: Any = None

    def __next__(self) -> dict[str, Tensor]:
        self.start()
        try:
            while True:
                try:
                    return next(self._batches)
                except StopIteration:
                    self._batches = iter(self._loader)
        except TooManyUnreadable as error:  # from a worker it comes wrapped in the worker's traceback
            raise TooManyUnreadable(str(error).strip().rpartition("TooManyUnreadable: ")[2]) from None
        except (RuntimeError, OSError, MemoryError, EOFError) as error:
            if (reason := self._why_lost(error)) is None:
                raise
            raise WorkersLost(reason) from error

    def start(self) -> None:
        """Start the workers, which the first batch does otherwise."""
        if self._batches is not None:
            return
        try:
            self._batches = iter(self._loader)
        except OSError as error:
            if (reason := self._why_lost(error)) is None:
                raise
            raise WorkersLost(reason) from error
        # torch's handler raises wherever the main thread is when a worker dies, in the middle of a save or an update;
        # waiting for the batch of a dead worker ends all the same.
        if threading.current_thread() is threading.main_thread():
            self._child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL

    def _why_lost(self, error: Exception) -> str | None:
        """What happened to the workers, None where the error is not of theirs."""
        count, text = self._loader.num_workers, str(error)
        if not count:
            return None
        fewer = f"use --workers 0, or fewer than {count}" if count > 1 else "use --workers 0"
        workers = getattr(self._batches, "_workers", [])
        broken = isinstance(error, (ConnectionError, EOFError)) or "exited unexpectedly" in text
        for worker in workers:
            worker.join(0.2 if broken else 0)  # what it held is closed before its end can be seen
        codes = [worker.exitcode for worker in workers]
        dead = [signal.Signals(-code).name for code in codes if code is not None and code < 0]
        if "SIGBUS" in dead or "shared memory" in text or "unable to write to file" in text:
            return f"/dev/shm, shared memory, is too small for what {count} data workers hand over: {fewer}"
        if dead:
            why = ", as the system does where memory runs out" if dead[0] == "SIGKILL" else ""
            return f"a data worker was ended by {dead[0]}{why}: {fewer}"
        if any(codes) or broken:
            return f"a data worker ended by itself: {fewer}"
        if isinstance(error, MemoryError):
            return f"a data worker ran out of memory: {fewer}"
        if "Too many open files" in text or "ancdata" in text:
            return f"too many files are open for {count} data workers: raise `ulimit -n`, or {fewer}"
        if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
            return f"{count} data workers cannot be started: {os.strerror(error.errno)}: {fewer}"
        return None

    def close(self, patience_s: float = END_S) -> None:
        """End the workers; those that still work after so many seconds are killed."""
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            ending = threading.Thread(target=_quietly, args=(iterator._shutdown_workers,), daemon=True)
            ending.start()
            ending.join(patience_s)
            for worker in iterator._workers:
                worker.kill()  # they ignore SIGTERM, by which the interpreter's exit would end them and wait
            for worker in iterator._workers:
                worker.join(END_S)
            ending.join(END_S)
            self._loader._iterator = None
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)
            self._child_handler = None
