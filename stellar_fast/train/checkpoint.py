"""Writes checkpoints that are either whole or not there.

One is written under another name, flushed to the disk and renamed: a run killed at any moment leaves the old ones
intact. What it holds stands in stellar_fast.checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import IO, Any, cast

import torch

from stellar_fast.checkpoint import (
    FILES,
    FORMAT,
    VERSION,
    checkpoint_folders,
    checkpoint_path,
    is_ours,
    open_checkpoint,
    read_checkpoint,
    sha256,
    step_of,
)
from stellar_fast.files import TEMPORARY, explained, shown, write_atomically
from stellar_fast.models import StellarModel

_LEFTOVER = re.compile(rf"{re.escape(TEMPORARY)}step_\d{{8,}}(-old|-replaced)?")


def save_checkpoint(
    root: Path, step: int, model: StellarModel, state: dict[str, Any], run: dict[str, Any], keep: int
) -> Path:
    """Write `root/step_<step>` and remove all but the newest `keep` checkpoints up to this step.

    The disk needs room for `keep` + 1.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps done.
        model: its weights, momentum teacher included, and its config are saved.
        state: what else training needs; tensors and plain values.
        run: JSON-able facts about the run, under "run" in meta.json.
        keep: checkpoints to keep, this one included.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: one sentence with the path, and of a full disk what is needed and what there is. The old checkpoints
            are whole, and nothing of the new one is left.
    """
    final = checkpoint_path(root, step)
    temporary, replaced = (root / f"{TEMPORARY}{final.name}{end}" for end in ("", "-replaced"))
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        if os.path.lexists(final) and not _is_good(final):  # one that was refused on resume makes room
            if not is_ours(final):
                raise FileExistsError("it exists and was not written by stellar_fast")
            os.replace(final, replaced)
            shutil.rmtree(replaced)
        temporary.mkdir()
        model._save_pretrained(temporary)
        write_atomically(temporary / "train.pt", lambda file: _write_state(state, file))
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "run": run,
            "torch": torch.__version__,
            "sha256": {name: sha256(temporary / name) for name in FILES},
        }
        write_atomically(temporary / "meta.json", json.dumps(meta, indent=2).encode())
        _fsync(temporary)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        _fsync(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # first: what is free by then is what the message tells
        if isinstance(error, OSError):
            raise explained(error, final, _bytes(model.upstream_state_dict()) + _bytes(state)) from error
        raise
    try:
        remove_old(root, step, keep)
    except OSError as error:
        warnings.warn(f"an old checkpoint stays in {shown(root)}: {error}", stacklevel=2)
    return final


def remove_old(root: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to this step."""
    # Later steps are not this run's (it was resumed from before them): they neither count nor go.
    for old in [path for path in checkpoint_folders(root) if step_of(path) <= step and _says_ours(path)][:-keep]:
        os.replace(old, root / f"{TEMPORARY}{old.name}-old")  # never a half-deleted folder under a checkpoint's name
    remove_leftovers(root)


def remove_leftovers(root: Path) -> None:
    """Remove what a run that was killed in the middle of a save has left in the folder of its checkpoints."""
    for leftover in root.glob(f"{TEMPORARY}*"):
        if _LEFTOVER.fullmatch(leftover.name):
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)


def _is_good(path: Path) -> bool:
    try:
        return bool(open_checkpoint(path))
    except ValueError:
        return False


def _says_ours(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path))
    except ValueError:
        return False


def _write_state(state: dict[str, Any], file: IO[bytes]) -> None:
    patient = _Patient(file)
    torch.save(state, cast(IO[bytes], patient))
    if patient.error is not None:
        raise patient.error


class _Patient:
    """A file that keeps its first error to itself: torch's zip writer, told of one, answers with others of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_bytes(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(part) for part in value)
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
