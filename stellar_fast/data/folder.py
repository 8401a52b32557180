"""A folder of images, read by Pillow as upright RGB."""

import logging
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
WHITE = (255, 255, 255)

logger = logging.getLogger(__name__)


class TooManyUnreadable(ValueError):
    """More files of a folder are unreadable than it allows."""


class ImageFolder:
    """The images below a folder, at any depth, in sorted order.

    An unreadable file is logged once with its path, counted in `failed` and replaced by another image, always the same
    one for the same index. In a DataLoader each worker process keeps a count of its own: a file may be logged once a
    worker, and the allowed share bounds what one worker has met.

    Args:
        root: folder to search; hidden files and folders are left out.
        labels: give (image, label) pairs, where the label is the index of the top folder in `classes`.
        max_failed_share: share of the files that may be unreadable before an error ends the run.

    Attributes:
        paths: the files.
        classes: sorted names of the top folders that hold images; empty without `labels`.
        failed: unreadable path -> reason.

    Raises:
        ValueError: no such folder, no image in it, or with `labels` an image outside of a class folder.
    """

    def __init__(self, root: str | os.PathLike[str], labels: bool = False, max_failed_share: float = 0.1):
        self.root = Path(root)
        self.labels = labels
        self.max_failed_share = max_failed_share
        self.failed: dict[Path, str] = {}
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        self.paths = _find_images(self.root)
        if not self.paths:
            raise ValueError(f"{self.root} holds no images ({', '.join(sorted(EXTENSIONS))})")
        self.classes: list[str] = []
        if labels:
            parts = [path.relative_to(self.root).parts for path in self.paths]
            stray = next((path for path, p in zip(self.paths, parts, strict=True) if len(p) == 1), None)
            if stray is not None:
                raise ValueError(f"labels need class folders, but {stray} lies directly in {self.root}")
            self.classes = sorted({p[0] for p in parts})
            numbers = {name: number for number, name in enumerate(self.classes)}
            self._labels = [numbers[p[0]] for p in parts]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image | tuple[Image.Image, int]:
        """Image `index`, or its replacement; with `labels` the pair (image, label).

        Raises:
            IndexError: index out of range.
            TooManyUnreadable: the share of unreadable files exceeds `max_failed_share`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        replacements = random.Random(index)
        while True:
            path = self.paths[index]
            if path not in self.failed:
                try:
                    image = load_image(path)
                    return (image, self._labels[index]) if self.labels else image
                except ValueError as error:
                    self._record_failure(path, error)
            index = replacements.randrange(len(self))

    def _record_failure(self, path: Path, error: ValueError) -> None:
        self.failed[path] = str(error)
        logger.warning("%s; another image takes its place", error)
        if len(self.failed) > self.max_failed_share * len(self) or len(self.failed) == len(self):
            raise TooManyUnreadable(
                f"{len(self.failed)} of {len(self)} images in {self.root} are unreadable, "
                f"more than the allowed share of {self.max_failed_share:g}; the last one: {error}"
            ) from error


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The EXIF orientation is applied; transparency (RGBA, LA, palettes) is laid over white; 16-bit and floating-point
    grey images are scaled to 8 bits; of an animation the first frame is taken.

    Raises:
        ValueError: the file is missing, truncated or no image; the message names its path.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
            return to_rgb(image)
    except Exception as error:  # a broken file makes the decoders raise nearly anything, SyntaxError included
        raise ValueError(f"cannot read image {os.fspath(path)}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as `load_image` describes."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(levels: np.ndarray, mode: str) -> np.ndarray:
    if mode == "F":
        scale = 255.0 if levels.max(initial=0.0) <= 1.0 else 1.0  # either [0, 1] or [0, 255]
        return (np.nan_to_num(levels) * scale).clip(0, 255).round().astype(np.uint8)
    # 16-bit files open as "I;16" or, from PNG in older Pillow, as "I"; "I" within 8 bits is taken as it stands.
    if mode == "I" and levels.max(initial=0) < 256:
        return levels.clip(0, 255).astype(np.uint8)
    return ((levels.astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8)


def _find_images(root: Path) -> list[Path]:
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back to a folder that was searched already
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append(Path(folder, name))
    return sorted(found)
