"""Checkpoints that are either whole or not there.

`RUN/checkpoints/step_00001000/` holds

    model.safetensors   the weights under upstream's names (momentum teacher included, VQGAN not)
    config.json         builds the model: the folder is what `from_pretrained` takes
    train.pt            optimizer, random states, position in the data, counters; loads with weights_only=True
    meta.json           format, step, the run's configuration, SHA-256 of the other three

It is written under another name, flushed to the disk and renamed: a run killed at any moment leaves the old ones
intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stellar_fast.files import write_atomically
from stellar_fast.models import StellarModel

FORMAT = "stellar_fast.checkpoint"
VERSION = 1
_FILES = ("model.safetensors", "config.json", "train.pt")
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its files are present and have the hashes that meta.json gives."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def state(self) -> dict[str, Any]:
        return torch.load(self.path / "train.pt", map_location="cpu", weights_only=True)


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def save_checkpoint(
    root: Path, step: int, model: StellarModel, state: dict[str, Any], run: dict[str, Any], keep: int
) -> Path:
    """Write `root/step_<step>` and remove all but the newest `keep` checkpoints up to this step.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps done.
        model: its weights, momentum teacher included, and its config are saved.
        state: what else training needs; tensors and plain values.
        run: JSON-able facts about the run, under "run" in meta.json.
        keep: checkpoints to keep, this one included.

    Returns:
        The path of the checkpoint.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    final = checkpoint_path(root, step)
    temporary = root / f"{_TEMPORARY}{final.name}"
    temporary.mkdir()
    model._save_pretrained(temporary)
    torch.save(state, temporary / "train.pt")
    hashes = {name: _sha256(temporary / name) for name in _FILES}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "run": run,
        "torch": torch.__version__,
        "sha256": hashes,
    }
    write_atomically(temporary / "meta.json", json.dumps(meta, indent=2).encode())
    _fsync(temporary / "train.pt")
    _fsync(temporary)
    if final.exists():  # one that was refused on resume: it makes room, and goes only once the new one is in place
        os.replace(final, root / f"{_TEMPORARY}{final.name}-replaced")
    os.replace(temporary, final)
    _fsync(root)
    # Later steps are not this run's (it was resumed from before them): they neither count nor go.
    for old in [path for path in _candidates(root) if _step(path) <= step][:-keep]:
        os.replace(old, root / f"{_TEMPORARY}{old.name}-old")  # never a half-deleted folder under a checkpoint's name
    _sweep(root)
    return final


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Verify the checkpoint at `path`; ValueError names it and the reason where it is not whole or not ours."""
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text())
    except OSError:
        raise ValueError(f"{path} is not a checkpoint: it has no readable meta.json") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: meta.json is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of stellar_fast: meta.json does not say format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path} has format version {meta.get('version')!r}, this release reads version {VERSION}")
    hashes = meta.get("sha256")
    if not isinstance(hashes, dict) or not isinstance(meta.get("step"), int):
        raise ValueError(f"{path} is damaged: meta.json lacks the hashes or the step")
    for name in _FILES:
        if not (path / name).is_file():
            raise ValueError(f"{path} is damaged: {name} is missing")
        found = _sha256(path / name)
        if found != hashes.get(name):
            raise ValueError(
                f"{path} is damaged: {name} has SHA-256 {found[:12]}, meta.json {str(hashes.get(name))[:12]}"
            )
    return Checkpoint(path, meta)


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint under `root` and, for each newer one that was passed over, why (with its path)."""
    refused: list[str] = []
    for path in reversed(_candidates(root)):
        try:
            return open_checkpoint(path), refused
        except ValueError as error:
            refused.append(str(error))
    return None, refused


def find_weights(path: str) -> str:
    """What `from_pretrained` takes: a run's folder means its newest good checkpoint, everything else itself.

    Raises:
        ValueError: a run without a good checkpoint.
    """
    checkpoint, refused = newest_checkpoint(Path(path) / "checkpoints")
    if refused and not checkpoint:
        raise ValueError(refused[0])
    for reason in refused:
        warnings.warn(f"checkpoint refused: {reason}", stacklevel=2)
    return str(checkpoint.path) if checkpoint else path


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _candidates(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _step(path) >= 0), key=_step)


def _sweep(root: Path) -> None:
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
