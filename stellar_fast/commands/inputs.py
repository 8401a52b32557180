"""What the commands over images read: weights, and images in batches."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stellar_fast.files import shown
from stellar_fast.train.config import resolve_device

if TYPE_CHECKING:
    import torch

    from stellar_fast import StellarEncoder, StellarModel
    from stellar_fast.commands.work import Work


def load(weights: str, model: str, device: str) -> StellarEncoder:
    """The encoder of any weights, whatever their reconstruction needs."""
    where = _device(weights, device)

    from stellar_fast import StellarEncoder, native

    native.raise_allocator_thresholds()
    return StellarEncoder.from_pretrained(weights, model=model or None).to(where).eval()


def load_full(weights: str, model: str, vq_model: str, device: str) -> StellarModel:
    """The whole model."""
    where = _device(weights, device)

    from stellar_fast import StellarModel, native

    native.raise_allocator_thresholds()
    options = {"vq_model": vq_model} if vq_model else {}
    return StellarModel.from_pretrained(weights, model=model or None, **options).to(where).eval()


def _device(weights: str, device: str) -> torch.device:
    if not weights:
        raise ValueError("weights is empty: name a folder, a file or a hub id")
    return resolve_device(device)


def find(images: str, skip: int, limit: int) -> Sequence[Path]:
    """The image files of a folder, or the one file, without the first `skip` and then at most `limit` (0: all)."""
    from stellar_fast.data import ImageFolder

    if not images:
        raise ValueError("images is empty: name a folder of images, or one image")
    if limit < 0 or skip < 0:
        raise ValueError(f"limit {limit} and skip {skip} must be at least 0")
    paths: Sequence[Path] = [Path(images)] if Path(images).is_file() else ImageFolder(images).paths
    if skip >= len(paths):
        raise ValueError(f"skip {skip} leaves none of the {len(paths)} images under {shown(images)}")
    return paths[skip:][: limit or None]


def relative_name(path: Path, images: str) -> str:
    """Path of an image relative to the folder that was asked for."""
    return path.name if path == Path(images) else str(path.relative_to(images))


def _check_size(size: int, batch_size: int) -> None:
    """Raise ValueError where crops of this size cannot be made, or a batch of them as floats not be held."""
    from PIL import Image

    most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if size**2 > most:
        raise ValueError(f"size {size:,} makes pictures of {size**2:,} pixels, and Pillow makes none over {most:,}")
    needed, memory = 4 * 3 * size**2 * batch_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"{batch_size} images of {size:,} x {size:,} pixels need {needed / 2**30:,.1f} GiB, and this machine has "
            f"{memory / 2**30:,.1f} GiB: a smaller --size or --batch-size"
        )


def batches(
    paths: Sequence[Path],
    images: str,
    size: int,
    batch_size: int,
    work: Work,
    value_range: tuple[float, float] | None = None,
    max_pixels: int = 0,
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Names and (B, 3, size, size) uint8 crops until all are done or `work` is to stop.

    Unreadable images are reported and left out.

    Raises:
        ValueError: all are unreadable, or the folder is gone.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from stellar_fast.data import ImageReader, eval_transform

    if batch_size < 1 or size < 1:
        raise ValueError(f"batch size {batch_size} and size {size} must be at least 1")

    reader = ImageReader(value_range, max_pixels or None)
    _check_size(size, min(batch_size, len(paths)))

    def read(path: Path) -> torch.Tensor | None:
        try:
            with reader.opened(path) as image:
                return eval_transform(image, size)
        except ValueError as error:
            if not os.path.exists(images):
                raise ValueError(f"{shown(images)} is there no more") from error
            warnings.warn(str(error), stacklevel=2)
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            pairs = zip(chunk, pool.map(read, chunk), strict=True)
            loaded = [(relative_name(path, images), image) for path, image in pairs if image is not None]
            if loaded:
                yield [name for name, _ in loaded], torch.stack([image for _, image in loaded])
            if work.stopping:
                return
            work.passed(relative_name(chunk[-1], images))
    if not work.has_results:
        raise ValueError(f"none of the {len(paths)} images under {shown(images)} can be read")
