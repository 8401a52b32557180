"""What the commands over images read: weights, and images in batches."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from stellar_fast.commands.console import errors
from stellar_fast.train.config import resolve_device

if TYPE_CHECKING:
    import torch

    from stellar_fast import StellarEncoder, StellarModel


def load(weights: str, model: str, device: str) -> StellarEncoder:
    """The encoder of any weights, whatever their reconstruction needs."""
    where = resolve_device(device)

    from stellar_fast import StellarEncoder, native
    from stellar_fast.train.checkpoint import find_weights

    native.raise_allocator_thresholds()
    return StellarEncoder.from_pretrained(find_weights(weights), model=model or None).to(where).eval()


def load_full(weights: str, model: str, vq_model: str, device: str) -> StellarModel:
    """The whole model."""
    where = resolve_device(device)

    from stellar_fast import StellarModel, native
    from stellar_fast.train.checkpoint import find_weights

    native.raise_allocator_thresholds()
    options = {"vq_model": vq_model} if vq_model else {}
    return StellarModel.from_pretrained(find_weights(weights), model=model or None, **options).to(where).eval()


def find(images: str, limit: int) -> list[Path]:
    """The first `limit` (0: all) image files of a folder, or the one file."""
    from stellar_fast.data import ImageFolder

    if limit < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    paths = [Path(images)] if Path(images).is_file() else ImageFolder(images).paths
    return paths[: limit or None]


def relative_name(path: Path, images: str) -> str:
    """Path of an image relative to the folder that was asked for."""
    return path.name if path == Path(images) else str(path.relative_to(images))


def pictures(paths: list[Path], images: str, out: str) -> dict[str, Path]:
    """Where the PNG of each image goes; a.jpg and a.png get two."""
    root = Path(images).parent if Path(images).is_file() else Path(images)
    target, source = Path(out).resolve(), root.resolve()
    if target == source or (target.is_relative_to(source) and not Path(images).is_file()):
        raise ValueError(f"out {out} lies in the folder of the images, {root}: its pictures would mix with them")
    names = [relative_name(path, images) for path in paths]
    stems = Counter(Path(name).with_suffix("") for name in names)
    return {
        name: Path(out) / (f"{name}.png" if stems[Path(name).with_suffix("")] > 1 else Path(name).with_suffix(".png"))
        for name in names
    }


def batches(paths: list[Path], images: str, size: int, batch_size: int) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Names and (B, 3, size, size) uint8 crops. Unreadable images are reported and left out; ValueError for all."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from stellar_fast.data import eval_transform, load_image

    if batch_size < 1 or size < 1:
        raise ValueError(f"batch size {batch_size} and size {size} must be at least 1")

    def read(path: Path) -> torch.Tensor | None:
        try:
            return eval_transform(load_image(path), size)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    found = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        starts = range(0, len(paths), batch_size)
        for start in track(starts, "images", console=errors, transient=True, disable=not errors.is_terminal):
            chunk = paths[start : start + batch_size]
            pairs = zip(chunk, pool.map(read, chunk), strict=True)
            loaded = [(relative_name(path, images), image) for path, image in pairs if image is not None]
            if loaded:
                found += len(loaded)
                yield [name for name, _ in loaded], torch.stack([image for _, image in loaded])
    if not found:
        raise ValueError(f"none of the {len(paths)} images under {images} can be read")
