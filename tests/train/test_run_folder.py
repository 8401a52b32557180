"""Nothing that a run did not write is replaced, and a start that is refused leaves everything as it was."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from stellar_fast.checkpoint import FORMAT
from stellar_fast.files import MARK, lock_folder
from stellar_fast.train import TrainConfig, run_folder, train

RECORD = {"step": 1, "epoch": 0.5, "progress": 0.1, "seconds": 1.0, "images_per_second": 2.0, "loss": 1.0}


def tree(folder: Path) -> dict[str, object]:
    """All that is below a folder, by name: bytes of files, targets of links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def step_folder(out: Path, step: int, files: dict[str, str]) -> None:
    folder = out / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def their_config(out: Path) -> None:
    (out / "config.yaml").write_text("learning_rate: 0.1\n")


def hand_written_config(out: Path) -> None:
    (out / "config.yaml").write_text("# my options\nlr: 0.1\n")


def their_metrics(out: Path) -> None:
    (out / "metrics.jsonl").write_text('{"step": 3, "loss": 2}\n')


def metrics_that_are_no_file(out: Path) -> None:
    os.mkfifo(out / "metrics.jsonl")


def their_checkpoint(out: Path) -> None:
    step_folder(out, 5, {"meta.json": '{"epoch": 3}', "config.json": "{}", "model.safetensors": "theirs"})


def a_file_of_a_checkpoints_name(out: Path) -> None:
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "step_00000005").write_text("mine")


def their_events(out: Path) -> None:
    (out / "tensorboard").mkdir()
    (out / "tensorboard" / "notes").write_text("mine")


def checkpoints_that_are_a_file(out: Path) -> None:
    (out / "checkpoints").write_text("a list of checkpoints")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (their_config, r"config\.yaml was not written by a run of stellar_fast: name another --out"),
        (hand_written_config, r"config\.yaml was not written by a run"),
        (their_metrics, r"metrics\.jsonl was not written by a run"),
        (metrics_that_are_no_file, r"metrics\.jsonl was not written by a run"),
        (their_checkpoint, r"step_00000005 was not written by a run"),
        (a_file_of_a_checkpoints_name, r"step_00000005 was not written by a run"),
        (their_events, r"tensorboard was not written by a run"),
        (checkpoints_that_are_a_file, r"checkpoints cannot be a folder: .*checkpoints is a file"),
    ],
)
def test_what_others_wrote_stays(
    config: TrainConfig, resume: bool, place: Callable[[Path], None], message: str
) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    place(out)
    before = tree(out)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, tensorboard=True), resume=resume)
    assert tree(out) == before
    lock_folder(out).close()


def test_files_of_other_names_stay_in_a_runs_folder(config: TrainConfig) -> None:
    out = Path(config.out)
    names = ("notes.txt", "checkpoints/best/model.bin", "checkpoints/step_5", "checkpoints/.writing-novel/1", ".lock")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    train(dataclasses.replace(config, steps=2))
    step_folder(out, 1, {"model.safetensors": "theirs"})  # older than the run's own, where it does not come again
    train(dataclasses.replace(config, steps=2, keep=1), resume=True)
    assert [(out / name).read_text() for name in names] == list(names)
    assert (out / "checkpoints/step_00000001/model.safetensors").read_text() == "theirs"


def missing_data(config: TrainConfig, tmp_path: Path) -> dict[str, object]:
    return {"data": str(tmp_path / "nowhere")}


def a_link_to_a_file(config: TrainConfig, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    return {"out": str(tmp_path / "link")}


def a_fifo(config: TrainConfig, tmp_path: Path) -> dict[str, object]:
    os.mkfifo(tmp_path / "fifo")
    return {"out": str(tmp_path / "fifo")}


def below_a_file(config: TrainConfig, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "file").write_text("mine")
    return {"out": str(tmp_path / "file" / "deep")}


def the_data_by_another_name(config: TrainConfig, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "pictures").symlink_to(config.data)
    return {"out": str(tmp_path / "pictures")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda config, tmp_path: {"out": ""}, "out is empty: name a folder"),
        (lambda config, tmp_path: {"out": "/dev/null"}, "/dev/null cannot be a folder: /dev/null is a device"),
        (missing_data, "nowhere is not a folder"),
        (a_link_to_a_file, r"link cannot be a folder: .*/file is a file"),
        (a_fifo, r"fifo cannot be a folder: .*/fifo is a FIFO"),
        (below_a_file, r"deep cannot be a folder: .*/file is a file"),
        (the_data_by_another_name, "pictures is the folder of the images: name another one for the run"),
        (lambda config, tmp_path: {"batch_size": 64}, "10 images do not fill one batch"),
        (lambda config, tmp_path: {"model": {"masks": 1}}, "unknown model option 'masks'"),
    ],
)
def test_a_refused_start_leaves_no_trace(
    config: TrainConfig, tmp_path: Path, changes: Callable, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, out=f"{config.out}/deep/run")
    config = dataclasses.replace(config, **changes(config, tmp_path))
    data, before = Path(config.data), tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    for resume in (False, True):
        with pytest.raises(ValueError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            train(config, resume=resume)
        assert tree(tmp_path) == before
    assert not list(data.glob("*.yaml")) and not list(data.glob(".*"))


def test_a_place_is_refused_before_anything_is_built(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stellar_fast.train.loop.build_model", lambda _: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match="is a device"):
        train(dataclasses.replace(config, out="/dev/null"))

    def refuse(folder: Path) -> None:
        raise ValueError(f"nothing can be written in {folder}: Read-only file system")

    monkeypatch.setattr(run_folder, "check_writable", refuse)
    with pytest.raises(ValueError, match=r"nothing can be written in .*run: Read-only"):
        train(config)
    assert not Path(config.out).exists()


def test_a_folder_is_looked_at_once_it_is_held(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start may come and go while this one waits for its turn: what it left is no longer free."""

    def late(folder: Path):
        monkeypatch.undo()
        train(config)
        return lock_folder(folder)

    monkeypatch.setattr(run_folder, "lock_folder", late)
    with pytest.raises(ValueError, match="already holds a run"):
        train(config)
    assert len(list(Path(config.out, "checkpoints").iterdir())) == 1


def test_a_folder_that_is_held_is_neither_written_nor_removed(config: TrainConfig) -> None:
    out = Path(config.out)
    out.mkdir()
    with lock_folder(out):
        for resume in (False, True):
            with pytest.raises(ValueError, match="run is in use by another process"):
                train(config, resume=resume)
        assert out.is_dir() and not list(out.iterdir())


def test_a_link_to_a_folder_is_a_place(config: TrainConfig, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")  # which is made
    result = train(dataclasses.replace(config, out=str(link), steps=1))
    assert link.is_symlink() and result.checkpoint == link / "checkpoints" / "step_00000001"
    assert (tmp_path / "disk" / "checkpoints" / "step_00000001" / "meta.json").is_file()


def as_the_previous_release(out: Path) -> None:
    """No mark in config.yaml, a file .lock, no count of the teacher's updates."""
    path = out / "config.yaml"
    mark, _, rest = path.read_text().partition("\n")
    assert mark == f"# {MARK}"
    path.write_text(rest)
    (out / ".lock").touch()
    assert yaml.safe_load(rest)["data"]


def test_a_run_of_the_previous_release_resumes(config: TrainConfig) -> None:
    out = Path(config.out)
    train(config)
    as_the_previous_release(out)
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
        train(config)
    assert train(config, resume=True).step == 7
    assert (out / "config.yaml").read_text().startswith(f"# {MARK}\n")
    as_the_previous_release(out)
    for path in out.glob("checkpoints/*/*"):
        path.unlink()
    for path in out.glob("checkpoints/*"):
        path.rmdir()
    with pytest.warns(UserWarning, match="the run starts from the beginning"):
        assert train(config, resume=True).step == 7  # known by its metrics


def test_a_damaged_checkpoint_of_a_run_makes_room(config: TrainConfig) -> None:
    """The one before is taken, and the run comes to save where the damaged one lies."""
    config = dataclasses.replace(config, save_every=3)
    expected = train(config).model.state_dict()
    last = Path(config.out) / "checkpoints" / "step_00000007"
    meta = (last / "meta.json").read_text()
    for damage in (meta[:60], "", '{"format": "another"}'):
        assert (FORMAT in damage) == (damage == meta[:60])
        (last / "meta.json").write_text(damage)
        with pytest.warns(UserWarning, match=r"checkpoint refused: .*step_00000007"):
            result = train(config, resume=True)
        assert result.step == 7 and result.checkpoint == last
        assert json.loads((last / "meta.json").read_text())["step"] == 7
        assert all(torch.equal(tensor, expected[name]) for name, tensor in result.model.state_dict().items())


def test_leftovers_of_a_killed_run_go_at_the_next_start(config: TrainConfig) -> None:
    out = Path(config.out)
    train(dataclasses.replace(config, steps=2))
    leftovers = [out / "checkpoints" / name for name in (".writing-step_00000009", ".writing-step_00000001-old")]
    for folder in leftovers:
        folder.mkdir()
        (folder / "train.pt").write_bytes(b"half")
    files = [out / ".writing-metrics.jsonl-abcdefgh", out / ".writing-config.yaml-12345678"]
    for file in files:
        file.write_text("half")
    train(dataclasses.replace(config, steps=2), resume=True)
    assert not list(out.rglob(".writing-*"))


def test_checkpoints_on_a_disk_that_is_not_mounted_are_missed(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    run, elsewhere = Path(config.out), tmp_path / "disk"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="unmounted, which is not there: is its disk mounted"):
        train(config, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == metrics and not (tmp_path / "unmounted").exists()
