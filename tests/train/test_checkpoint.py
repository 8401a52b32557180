import json
import shutil
from pathlib import Path

import pytest
import torch

from stellar_fast import DecoderConfig, EncoderConfig, StellarModel
from stellar_fast.train.checkpoint import newest_checkpoint, open_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def model(tiny: dict) -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(EncoderConfig(**tiny["encoder"]), DecoderConfig(**tiny["decoder"]), **tiny["model"])


def save(root: Path, step: int, model: StellarModel, keep: int = 3) -> Path:
    return save_checkpoint(root, step, model, {"step": step, "tensor": torch.arange(step)}, {"seed": 0}, keep)


def test_round_trip(tmp_path: Path, model: StellarModel) -> None:
    path = save(tmp_path, 12, model)
    assert path == tmp_path / "step_00000012"
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and refused == []
    assert (checkpoint.path, checkpoint.step, checkpoint.meta["run"]) == (path, 12, {"seed": 0})
    assert torch.equal(checkpoint.state()["tensor"], torch.arange(12))
    expected = model.upstream_state_dict()
    assert checkpoint.weights().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.weights().items())
    again = StellarModel.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_newest_are_kept(tmp_path: Path, model: StellarModel) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, model, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def truncate(path: Path) -> None:
    file = path / "train.pt"
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def remove_a_file(path: Path) -> None:
    (path / "model.safetensors").unlink()


def remove_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def halve_meta(path: Path) -> None:
    file = path / "meta.json"
    file.write_text(file.read_text()[:40])


def foreign_meta(path: Path) -> None:
    (path / "meta.json").write_text('{"epoch": 3}')


def newer_version(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"version": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "train.pt has SHA-256"),
        (flip_a_bit, "model.safetensors has SHA-256"),
        (remove_a_file, "model.safetensors is missing"),
        (remove_meta, "no readable meta.json"),
        (halve_meta, "meta.json is not JSON"),
        (foreign_meta, "not a checkpoint of stellar_fast"),
        (newer_version, "format version 99"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_the_one_before_taken(tmp_path: Path, model, damage, reason: str) -> None:
    good, bad = save(tmp_path, 1, model), save(tmp_path, 2, model)
    damage(bad)
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.path == good
    assert len(refused) == 1 and str(bad) in refused[0] and reason in refused[0]
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(bad)


def test_half_written_and_foreign_folders_are_not_looked_at(tmp_path: Path, model: StellarModel) -> None:
    good = save(tmp_path, 1, model)
    shutil.copytree(good, tmp_path / ".writing-step_00000002")
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.path == good and refused == []
    save(tmp_path, 2, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "step_00000001",
        "step_00000002",
        "step_00000009",
    ]


def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: Path, model: StellarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, model, keep=1)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2, model, keep=1)
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.path == good and refused == []


def test_after_a_fallback_the_bad_later_one_costs_no_good_one(tmp_path: Path, model: StellarModel) -> None:
    save(tmp_path, 1, model)
    truncate(save(tmp_path, 3, model))
    save(tmp_path, 2, model, keep=1)
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2 and len(refused) == 1
    save(tmp_path, 3, model, keep=1)  # takes the bad one's place
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 3 and refused == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
