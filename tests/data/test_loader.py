"""The order of training, and that neither workers nor an interruption change it."""

import errno
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stellar_fast.data import (
    EpochSampler,
    ImageFolder,
    MultiViewDataset,
    MultiViewTransform,
    TooManyUnreadable,
    loader,
)
from stellar_fast.data.loader import EndlessBatches, WorkersLost, stable_seed


@pytest.fixture
def dataset(tmp_path: Path) -> MultiViewDataset:
    rng = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return MultiViewDataset(ImageFolder(tmp_path), MultiViewTransform(16, 8, 2, 2), seed=3)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_views_depend_on_seed_epoch_and_index(dataset: MultiViewDataset) -> None:
    assert len(dataset) == 7
    assert same(dataset[2, 4], dataset[2, 4])
    assert not same(dataset[2, 4], dataset[3, 4])
    other_seed = MultiViewDataset(dataset.folder, dataset.transform, seed=4)
    assert not same(dataset[2, 4], other_seed[2, 4])


def test_any_number_of_workers_gives_the_same_batches(dataset: MultiViewDataset) -> None:
    runs = []
    for workers in (0, 1, 2):
        sampler = EpochSampler(len(dataset), 2, seed=1)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        runs.append([batch for _ in range(2) for batch in loader])
    assert len(runs[0]) == 6 and runs[0][0]["global_views"].shape == (2, 2, 3, 16, 16)
    for run in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], run, strict=True))
    assert not same(runs[0][0], runs[0][3])


def test_an_epoch_visits_every_sample_once_in_a_new_order() -> None:
    sampler = EpochSampler(10, 2, seed=1)
    epochs = [list(sampler) for _ in range(3)]
    for number, batches in enumerate(epochs):
        assert len(batches) == len(sampler) == 5
        assert {epoch for batch in batches for epoch, _ in batch} == {number}
        assert sorted(index for batch in batches for _, index in batch) == list(range(10))
    orders = [[index for batch in batches for _, index in batch] for batches in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert [list(EpochSampler(10, 2, seed=1))] == epochs[:1]
    assert list(EpochSampler(10, 2, seed=2)) != epochs[0]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_samples", [10, 11, 13])
def test_ranks_share_an_epoch(num_samples: int, drop_last: bool) -> None:
    ranks = [EpochSampler(num_samples, 2, 0, rank, 3, drop_last) for rank in range(3)]
    shares = [list(sampler) for sampler in ranks]
    sizes = [[len(batch) for batch in share] for share in shares]
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == len(ranks[0])
    seen = [index for share in shares for batch in share for _, index in batch]
    if drop_last:
        assert len(seen) == len(set(seen)) == num_samples // 6 * 6
        assert set(sizes[0]) == {2}
    else:
        assert set(seen) == set(range(num_samples)) and len(seen) == -(-num_samples // 3) * 3


def test_resumes_in_the_middle_of_an_epoch() -> None:
    whole = EpochSampler(10, 3, seed=5)
    expected = [list(whole) for _ in range(3)]
    first = EpochSampler(10, 3, seed=5)
    batches = iter(first)
    taken = [next(batches), next(batches)]
    assert taken == expected[0][:2] and first.state_dict() == {"epoch": 0, "batch": 2}
    resumed = EpochSampler(10, 3, seed=5)
    resumed.load_state_dict(first.state_dict())
    assert list(resumed) == expected[0][2:]
    assert resumed.state_dict() == {"epoch": 1, "batch": 0}
    assert list(resumed) == expected[1]
    resumed.load_state_dict({"epoch": 1, "batch": 3})
    assert list(resumed) == [] and list(resumed) == expected[2]


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1 but is 0"):
        EpochSampler(10, 0)
    with pytest.raises(ValueError, match=r"rank must lie in .* but is 2 of 2"):
        EpochSampler(10, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"'batch': 6.*epochs of 5 batches"):
        EpochSampler(10, 2).load_state_dict({"epoch": 0, "batch": 6})


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("num_samples", "world"), [(1, 1), (10, 1), (10, 3), (13, 4), (64, 2), (1000, 7)])
def test_the_order_is_that_of_a_list(num_samples: int, world: int, drop_last: bool) -> None:
    """A run of an earlier release goes on in the order it began with."""
    for epoch in range(2):
        generator = torch.Generator().manual_seed(stable_seed(3, epoch))
        order = torch.randperm(num_samples, generator=generator).tolist()
        if not drop_last:
            order += order[: -len(order) % world]
        for rank in range(world):
            sampler = EpochSampler(num_samples, 3, 3, rank, world, drop_last)
            sampler.epoch = epoch
            mine = order[rank::world]
            expected = [[(epoch, i) for i in mine[3 * b : 3 * b + 3]] for b in range(len(sampler))]
            assert list(sampler) == expected
            assert all(type(index) is int for batch in expected for _, index in batch)


class Items(Dataset):
    """Numbers; some of them make a worker do something else first."""

    def __init__(self, deed: Callable[[], object], at: int) -> None:
        self.deed, self.at = deed, at

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.at:
            self.deed()
        return {"x": torch.tensor(index)}


def end_oneself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1000)


def fail(error: Exception) -> None:
    raise error


def endless(deed: Callable[[], object] = int, at: int = -1, workers: int = 2, count: int = 100) -> EndlessBatches:
    data = DataLoader(
        Subset(Items(deed, at), range(count)), batch_size=2, num_workers=workers, persistent_workers=workers > 0
    )
    return EndlessBatches(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_over_epochs(workers: int) -> None:
    batches = endless(workers=workers, count=4)
    before = signal.getsignal(signal.SIGCHLD)
    found = [next(batches)["x"].tolist() for _ in range(5)]
    batches.close()
    assert found == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert signal.getsignal(signal.SIGCHLD) is before or workers  # torch's own, set once a process
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (partial(end_oneself, signal.SIGKILL), "ended by SIGKILL, as the system does where memory runs out"),
        (partial(end_oneself, signal.SIGBUS), "/dev/shm, shared memory, is too small for what 2 data workers"),
        (partial(os._exit, 3), "a data worker ended by itself"),
        (partial(fail, MemoryError()), "a data worker ran out of memory"),
        (partial(fail, RuntimeError("unable to allocate shared memory(shm) for file </x>")), "/dev/shm, shared memory"),
        (partial(fail, OSError(errno.EMFILE, "Too many open files")), "raise `ulimit -n`"),
    ],
    ids=["killed", "bus-error", "exit", "memory", "shm", "files"],
)
def test_lost_workers_are_one_sentence_with_the_option(
    deed: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # seconds between looks
    with closing(endless(deed, at=3)) as batches, pytest.raises(WorkersLost, match=re.escape(message)) as error:
        for _ in range(2):
            next(batches)
    assert str(error.value).endswith("use --workers 0, or fewer than 2") and "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_workers_that_cannot_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: fail(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")))
    told = "2 data workers cannot be started: Resource temporarily unavailable: use --workers 0, or fewer than 2"
    with closing(endless()) as batches, pytest.raises(WorkersLost, match=told):
        next(batches)


def test_errors_of_the_data_stay_what_they_are() -> None:
    for workers in (0, 2):
        for error, message in ((KeyError("no file"), "no file"), (TooManyUnreadable("7 of 9"), r"^7 of 9$")):
            deed = partial(fail, error)
            with closing(endless(deed, 0, workers)) as batches, pytest.raises(type(error), match=message):
                next(batches)


def test_a_worker_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "END_S", 0.2)
    batches = endless(partial(time.sleep, 10_000), at=3)
    assert next(batches)["x"].tolist() == [0, 1]
    batches.close(0.2)
    assert multiprocessing.active_children() == []
