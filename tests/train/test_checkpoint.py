import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from stellar_fast import DecoderConfig, EncoderConfig, StellarModel
from stellar_fast.checkpoint import newest_checkpoint, open_checkpoint
from stellar_fast.train import checkpoint as writing
from stellar_fast.train.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def model(tiny: dict) -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(EncoderConfig(**tiny["encoder"]), DecoderConfig(**tiny["decoder"]), **tiny["model"])


def save(root: Path, step: int, model: StellarModel, keep: int = 3) -> Path:
    state = {"step": step, "tensor": torch.arange(step), "moments": [torch.zeros(10_000), torch.zeros(10_000)]}
    return save_checkpoint(root, step, model, state, {"seed": 0}, keep)


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


class FullDisk:
    """Stands in for the files that `write_atomically` writes: all of them together take so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, handle: int, mode: str) -> IO[bytes]:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.room -= len(data)
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        return File(handle, mode)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def test_a_full_disk_is_one_sentence_wherever_it_strikes_and_leaves_the_old_one(
    tmp_path: Path, model: StellarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, model, keep=1)
    whole = size(good)
    sizes = [(good / name).stat().st_size for name in ("model.safetensors", "config.json", "train.pt", "meta.json")]
    ends = [sum(sizes[:count]) for count in range(1, 5)]
    for room in (0, ends[0] - 1, ends[0], ends[1] + 1, ends[1] + sizes[2] // 2, ends[2] - 1, ends[2], ends[3] - 1):
        with monkeypatch.context() as patch:
            patch.setattr("stellar_fast.files.os.fdopen", FullDisk(room).open)
            with pytest.raises(OSError, match=r"cannot write .*step_00000002: the disk is full, .* are free") as error:
                save(tmp_path, 2, model, keep=1)
        needed_mib = float(re.search(r"full, ([\d.]+) MiB are needed", str(error.value))[1])
        assert whole / 2**20 - 0.2 < needed_mib < whole / 2**20
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        assert newest_checkpoint(tmp_path) == (open_checkpoint(good), [])
    with monkeypatch.context() as patch:
        patch.setattr("stellar_fast.files.os.fdopen", FullDisk(whole + 10).open)
        assert save(tmp_path, 2, model, keep=1) == newest_checkpoint(tmp_path)[0].path


@pytest.mark.parametrize("room", [0, 100, 1000, 40_000, 60_000])
def test_the_state_of_training_keeps_the_disks_own_error(tmp_path: Path, room: int) -> None:
    """torch's zip writer answers it with an error of its own in the middle of a file."""
    state = {"a": torch.zeros(10_000), "b": torch.zeros(10_000)}
    handle = os.open(tmp_path / "train.pt", os.O_WRONLY | os.O_CREAT)
    with FullDisk(room).open(handle, "wb") as file, pytest.raises(OSError, match="No space left") as error:
        writing._write_state(state, file)
    assert error.value.errno == errno.ENOSPC


def test_no_more_room_is_taken_than_for_one_above_those_kept(
    tmp_path: Path, model: StellarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at every write: the last good one and the new one, with one that is damaged out of the way."""
    save(tmp_path, 1, model)
    truncate(save(tmp_path, 2, model))
    most = 0

    def open_counted(handle: int, mode: str) -> IO[bytes]:
        nonlocal most
        most = max(most, sum(1 for path in tmp_path.iterdir()))
        return io.FileIO(handle, mode)

    monkeypatch.setattr("stellar_fast.files.os.fdopen", open_counted)
    for step in (2, 3, 4):
        save(tmp_path, step, model, keep=1)
    assert most == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def killed_at(event: int, deed: Callable[[], object]) -> bool:
    """Whether a child process that does it comes to its `event`-th change of the file system, where it is killed."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def look(name: str, arguments: tuple) -> None:
            writes = name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            deed()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_one(tmp_path: Path, model: StellarModel) -> None:
    first, event = save(tmp_path / "0", 1, model), 0
    found = set()
    while True:
        root = tmp_path / str(event + 1)
        shutil.copytree(first.parent, root)
        killed = killed_at(event, lambda root=root: save(root, 2, model, keep=1))
        checkpoint, refused = newest_checkpoint(root)
        assert checkpoint is not None and refused == []
        found.add(checkpoint.step)
        save(root, 3, model, keep=1)
        assert [path.name for path in root.iterdir()] == ["step_00000003"]
        shutil.rmtree(root)
        if not killed:
            break
        event += 1
    assert found == {1, 2} and event > 15


def test_what_others_wrote_is_neither_replaced_nor_removed(tmp_path: Path, model: StellarModel) -> None:
    theirs = [tmp_path / name for name in ("step_00000001", "step_00000005")]
    for folder in theirs:
        folder.mkdir()
        (folder / "model.safetensors").write_text("theirs")
    for step in (2, 3):
        save(tmp_path, step, model, keep=1)
    with pytest.raises(OSError, match=r"cannot write .*step_00000005: it exists and was not written by stellar_fast"):
        save(tmp_path, 5, model, keep=1)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "step_00000003").rename(elsewhere)
    (tmp_path / "step_00000003").symlink_to(elsewhere)  # moved to a larger disk
    save(tmp_path, 6, model, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere",
        "step_00000001",
        "step_00000005",
        "step_00000006",
    ]
    assert [(folder / "model.safetensors").read_text() for folder in theirs] == ["theirs"] * 2
    assert open_checkpoint(elsewhere).step == 3


def test_names_that_are_no_utf8_hold_checkpoints(tmp_path: Path, model: StellarModel) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9\nruns")
    path = save(root, 1, model)
    checkpoint, _ = newest_checkpoint(root)
    assert checkpoint is not None and checkpoint.path == path
    expected = model.upstream_state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.weights().items())
    again = StellarModel.from_pretrained(path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    truncate(path)
    assert newest_checkpoint(root)[1][0].startswith(rf"{tmp_path}/caf\xe9\nruns/step_00000001 is damaged: train.pt")


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
