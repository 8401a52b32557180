"""Checkpoints of training runs, as they are found, verified and read; stellar_fast.train.checkpoint writes them.

`RUN/checkpoints/step_00001000/` holds

    model.safetensors   the weights under upstream's names (momentum teacher included, VQGAN not)
    config.json         builds the model: the folder is what `from_pretrained` takes
    train.pt            optimizer, random states, position in the data, counters; loads with weights_only=True
    meta.json           format, step, the run's configuration, SHA-256 of the other three
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stellar_fast.files import shown, utf8_path

FORMAT = "stellar_fast.checkpoint"
VERSION = 1
FILES = ("model.safetensors", "config.json", "train.pt")
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its files are present and have the hashes that meta.json gives."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    def weights(self) -> dict[str, Tensor]:
        with utf8_path(self.path / "model.safetensors") as name:
            return load_file(name)

    def state(self) -> dict[str, Any]:
        return torch.load(self.path / "train.pt", map_location="cpu", weights_only=True)


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Verify the checkpoint at `path`; ValueError names it and the reason where it is not whole or not ours."""
    checkpoint = read_checkpoint(path)
    path, hashes = checkpoint.path, checkpoint.meta["sha256"]
    for name in FILES:
        if not (path / name).is_file():
            raise ValueError(f"{shown(path)} is damaged: {name} is missing")
        try:
            found = sha256(path / name)
        except OSError as error:
            raise ValueError(f"{shown(path)} is damaged: {name} cannot be read: {error.strerror}") from error
        if found != hashes.get(name):
            raise ValueError(
                f"{shown(path)} is damaged: {name} has SHA-256 {found[:12]}, meta.json {str(hashes.get(name))[:12]}"
            )
    return checkpoint


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What meta.json says; of the other files nothing is looked at. ValueError as `open_checkpoint`."""
    path = Path(path)
    try:
        if not (path / "meta.json").is_file():
            raise OSError("not a file")
        meta = json.loads((path / "meta.json").read_bytes())
    except OSError:
        raise ValueError(f"{shown(path)} is not a checkpoint: it has no readable meta.json") from None
    except ValueError:
        raise ValueError(f"{shown(path)} is damaged: meta.json is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{shown(path)} is not a checkpoint of stellar_fast: meta.json does not say format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{shown(path)} has format version {meta.get('version')!r}, this release reads version {VERSION}"
        )
    if not isinstance(meta.get("sha256"), dict) or not isinstance(meta.get("step"), int):
        raise ValueError(f"{shown(path)} is damaged: meta.json lacks the hashes or the step")
    return Checkpoint(path, meta)


def is_ours(path: Path) -> bool:
    """Whether this package wrote a checkpoint's folder, however damaged it is by now."""
    try:
        written = (path / "meta.json").is_file() and FORMAT.encode() in (path / "meta.json").read_bytes()
        config = path / "config.json"
        return written or (
            (path / "train.pt").is_file() and config.is_file() and b'"stellar_fast"' in config.read_bytes()
        )
    except OSError:
        return False


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint under `root` and, for each newer one that was passed over, why (with its path)."""
    refused: list[str] = []
    for path in reversed(checkpoint_folders(root)):
        try:
            return open_checkpoint(path), refused
        except ValueError as error:
            refused.append(str(error))
    return None, refused


def find_weights(path: str) -> str:
    """What a model is loaded from: a run, or its folder of checkpoints, means its newest good one, all else itself.

    Raises:
        ValueError: a run without a good checkpoint.
    """
    root = Path(path)
    checkpoint, refused = newest_checkpoint(root if checkpoint_folders(root) else root / "checkpoints")
    if refused and not checkpoint:
        raise ValueError(refused[0])
    for reason in refused:
        warnings.warn(f"checkpoint refused: {reason}", stacklevel=3)
    return str(checkpoint.path) if checkpoint else path


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def checkpoint_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
