"""The folder of a run: held and looked at before anything is built, written to once the run can start."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import yaml

from stellar_fast.checkpoint import Checkpoint, is_ours, newest_checkpoint, step_of
from stellar_fast.files import TEMPORARY, check_writable, lock_folder, shown
from stellar_fast.files import is_ours as carries_mark
from stellar_fast.train.checkpoint import remove_leftovers, remove_old
from stellar_fast.train.config import TrainConfig
from stellar_fast.train.loggers import JsonLines, Logger, TensorBoard, read_records

CONFIG, METRICS, EVENTS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"


class RunFolder:
    """A run's folder, which one process holds from `claim` to the end of the `with` block.

    Only what a run of this package wrote there is ever replaced. A run that does not come to `begin` leaves the folder
    as it was, missing where it was missing.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.out)
        self.checkpoints = self.path / CHECKPOINTS
        self._made: list[Path] = []
        self._held = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # by now it may hold what somebody else wrote
                folder.rmdir()
        self._held.close()

    def claim(self, resume: bool) -> Checkpoint | None:
        """Hold the folder, then see whether this run may write there.

        Returns:
            The newest good checkpoint of a run that is resumed, None where the run starts from the beginning.

        Raises:
            ValueError: no place for a run, one that another process holds, or one with files that are not this run's.
        """
        if not self.config.out:
            raise ValueError("out is empty: name a folder for the run (--out RUN)")
        place = Path(os.path.realpath(self.path))
        if self.config.data and place == Path(os.path.realpath(self.config.data)):
            raise ValueError(f"out {shown(self.path)} is the folder of the images: name another one for the run")
        for folder in (self.path, self.checkpoints):
            check_writable(folder)
        if self.config.tensorboard:
            TensorBoard.writer()
        made = [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True, exist_ok=True)
        self._held = lock_folder(place)
        self._made = made  # what another process holds is not this one's to remove
        if resume:
            return self._resumable()
        self._refuse_any_run()
        return None

    def begin(self, step: int, loggers: Sequence[Logger]) -> list[Logger]:
        """Write config.yaml, make room, and open the files of metrics, which continue after `step`."""
        root = Path(os.path.realpath(self.checkpoints))
        if not root.exists():
            self._made.insert(0, root)
            root.mkdir()
        remove_leftovers(root)
        for name in (CONFIG, METRICS):
            for leftover in self.path.glob(f"{TEMPORARY}{name}-*"):
                leftover.unlink()
        self.config.save(self._file(CONFIG))
        self._made = []
        if step:
            remove_old(root, step, self.config.keep)  # a killed run may leave one more than it keeps
        opened: list[Logger] = [JsonLines(self._file(METRICS), self.config.log_every, step), *loggers]
        if self.config.tensorboard:
            opened.append(TensorBoard(self.path / EVENTS, self.config.log_every, step))
        return opened

    def _file(self, name: str) -> Path:
        """A file of the run, or what a link of its name leads to."""
        return Path(os.path.realpath(self.path / name))

    def _steps(self) -> list[Path]:
        """Whatever has the name of a checkpoint."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((path for path in self.checkpoints.iterdir() if step_of(path) >= 0), key=step_of)

    def _refuse_any_run(self) -> None:
        """A new run goes where there is none."""
        names = (CONFIG, METRICS, EVENTS) if self.config.tensorboard else (CONFIG, METRICS)
        taken = [self.path / name for name in names if os.path.lexists(self.path / name)] + self._steps()
        if not taken:
            return
        self._refuse_foreign()
        for path in self._steps():
            _refuse(path, is_ours(path))
        raise ValueError(f"{shown(self.path)} already holds a run: continue it with --resume or name another --out")

    def _resumable(self) -> Checkpoint | None:
        """A resumed run goes where its own files are, or nothing of their names."""
        self._refuse_foreign()
        if self.checkpoints.is_symlink() and not self.checkpoints.exists():
            where = shown(os.path.realpath(self.checkpoints))
            raise ValueError(f"{shown(self.checkpoints)} leads to {where}, which is not there: is its disk mounted?")
        checkpoint, refused = newest_checkpoint(self.checkpoints)
        for path in self._steps():
            if not checkpoint or step_of(path) > checkpoint.step:  # the run may come to save there
                _refuse(path, is_ours(path))
        if refused and not checkpoint:
            raise ValueError(f"no good checkpoint in {shown(self.checkpoints)}: {refused[0]}")
        for reason in refused:
            warnings.warn(f"checkpoint refused: {reason}", stacklevel=2)
        if not checkpoint:
            text = f"no checkpoint in {shown(self.checkpoints)}: the run starts from the beginning"
            warnings.warn(text, stacklevel=2)
        return checkpoint

    def _refuse_foreign(self) -> None:
        records, ours = None, any(is_ours(path) for path in self._steps())
        metrics, config, events = (self._file(name) for name in (METRICS, CONFIG, EVENTS))
        with contextlib.suppress(ValueError):
            records = read_records(metrics)
        _refuse(metrics, records is not None)
        marked = config.is_file() and carries_mark(config)
        # the previous release left no mark
        _refuse(config, marked or not config.exists() or (_is_config(config) and bool(ours or records)))
        if self.config.tensorboard:
            _refuse(events, not events.exists() or (events.is_dir() and (config.exists() or ours)))


def _refuse(path: Path, accepted: bool) -> None:
    if not accepted:
        raise ValueError(f"{shown(path)} was not written by a run of stellar_fast: name another --out")


def _is_config(path: Path) -> bool:
    """Whether a file is the configuration of a run, as a program wrote it: with every option."""
    try:
        values = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    return isinstance(values, dict) and {"data", "out", "seed", "preset", "keep"} <= values.keys() <= known
