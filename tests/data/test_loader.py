"""The order of training, and that neither workers nor an interruption change it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stellar_fast.data import EpochSampler, ImageFolder, MultiViewDataset, MultiViewTransform


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
