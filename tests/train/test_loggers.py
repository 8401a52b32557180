import builtins
import errno
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stellar_fast.train.loggers import JsonLines, RichProgress, TensorBoard


def record(step: int, **values: object) -> dict:
    return {
        "step": step,
        "epoch": 0.5,
        "progress": step / 10,
        "seconds": 1.0,
        "images_per_second": 12.0,
        "loss": 1.5,
    } | values


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_writes_the_first_every_nth_the_last_and_every_skipped_step(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl", every=2)
    log.log(record(1))
    log.log(record(2))
    log.log(record(3, loss=float("nan"), skipped=["koleo_loss"]))
    log.log(record(5))
    log.log(record(7))
    log.close()
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == [1, 2, 3, 7]
    assert lines(tmp_path / "m.jsonl")[2]["loss"] is None  # NaN is not JSON


def test_json_lines_writes_null_inside_of_a_list(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl", every=1)
    log.log(record(1, matched_tokens=[0.5, float("nan"), float("inf")], skipped=["MSE"]))
    log.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = lines(tmp_path / "m.jsonl")
    assert line["matched_tokens"] == [0.5, None, None] and line["skipped"] == ["MSE"]


def test_json_lines_names_a_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"note": "mine"}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl is not a file of metrics"):
        JsonLines(tmp_path / "m.jsonl", every=1)
    assert "mine" in (tmp_path / "m.jsonl").read_text()


def test_json_lines_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    log = JsonLines(path, every=1, resume_step=2)
    log.log(record(3, loss=9.0))
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1.5), (2, 1.5), (3, 9.0)]


def test_progress_on_a_terminal_shows_every_number() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=120), every=1)
    progress.log(record(4, mask_loss=2.25))
    progress.log(record(5, mask_loss=float("nan"), skipped=["mask_loss"]))
    progress.close()
    shown = stream.getvalue()
    for text in ("step 5", "12.0 images/s", "loss", "1.5", "mask_loss", "skipped steps"):
        assert text in shown


def test_progress_without_a_terminal_prints_lines() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, width=80), every=2)
    for step in (1, 2, 3):
        progress.log(record(step))
    progress.log(record(5, skipped=["MSE"]))
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 2  20 %  12.0 images/s  loss 1.5",
        "step 5: skipped, not finite: MSE",
    ]


class Broken(io.StringIO):
    """A stream whose reader, disk or terminal is gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        raise self.error or AssertionError("written to again")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        ValueError("I/O operation on closed file"),
    ],
    ids=["reader", "disk", "terminal", "closed"],
)
def test_progress_that_cannot_be_printed_is_lost_and_nothing_else(
    error: Exception, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich's answer to a reader that is gone, for standard output
    uncaught: list[object] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    stream = Broken(error)
    progress = RichProgress(Console(file=stream, force_terminal=terminal, width=80), every=1)
    progress.log(record(1))
    stream.error = None
    progress.log(record(2))
    progress.close()
    assert uncaught == []


def test_a_full_disk_leaves_whole_lines_and_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, room = tmp_path / "m.jsonl", 150
    log = JsonLines(path, every=1)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal room
            count = super().write(data[: min(7, room)])  # part by part, as a disk may
            room -= count
            if not count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return count

    log._file = File(path, "ab")
    log.log(record(1))
    with pytest.raises(OSError, match=r"cannot write .*m\.jsonl: the disk is full, 0\.0 MiB are needed, .* are free"):
        log.log(record(2))
    assert [line["step"] for line in lines(path)] == [1]
    room = 1000
    log.close()  # the last record is tried again
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_tensorboard_takes_any_name(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9\nevents")
    log = TensorBoard(folder, every=1)
    log.log(record(1))
    log.close()
    (file,) = folder.iterdir()
    assert b"loss" in file.read_bytes()


def test_tensorboard_writes_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path, every=2)
    for step in (1, 2, 3, 4):
        log.log(record(step, loss=float(step)))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 2.0), (4, 4.0)]


def test_tensorboard_writes_lists_in_one_file_and_a_resumed_run_replaces_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path, every=1)
    for step in (1, 2, 3):
        log.log(record(step, matched_tokens=[step / 4, 0.5]))
    log.close()
    assert len(list(tmp_path.rglob("*"))) == 1
    log = TensorBoard(tmp_path, every=1, resume_step=1)
    log.log(record(2, matched_tokens=[0.75, 0.25]))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["matched_tokens/0"] == [(1, 0.25), (2, 0.75)]
    assert found["matched_tokens/1"] == [(1, 0.5), (2, 0.25)]
    assert not {"matched_tokens", "matched_tokens/2"} & found.keys()


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"stellar-fast\[log\]"):
        TensorBoard(tmp_path, every=1)
