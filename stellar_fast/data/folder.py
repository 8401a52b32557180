"""A folder of images, read as upright RGB."""

import logging
import os
import random
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from stellar_fast.data.flags import SharedFlags
from stellar_fast.data.levels import Range
from stellar_fast.data.names import LeftOut, Paths, search
from stellar_fast.data.read import ImageReader, TooManyPixels, endings
from stellar_fast.files import kind_of, shown

logger = logging.getLogger(__name__)


class TooManyUnreadable(ValueError):
    """More files of a folder are unreadable than it allows."""


class ImageFolder:
    """The images below a folder, at any depth, in sorted order; docs/data.md tells which files are images.

    An unreadable file is logged once with its path, counted and replaced by another image, always the same one for the
    same index. The worker processes of a DataLoader that are forked share the count; those that are spawned keep one
    each. What is doubtful about a file's numbers is logged once a kind; a warning tells which files were not looked at.

    Args:
        root: folder to search.
        labels: give (image, label) pairs, where the label is the index of the top folder in `classes`.
        max_failed_share: share of the files that may be unreadable before an error ends the run.
        value_range, max_pixels: as in `load_image`.

    Attributes:
        paths: the files, a sequence of Path.
        classes: sorted names of the top folders that hold images; empty without `labels`.
        failed: unreadable path -> reason, as far as this process met them.

    Raises:
        ValueError: no such folder, no image in it, or with `labels` an image outside of a class folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        labels: bool = False,
        max_failed_share: float = 0.1,
        value_range: Range | None = None,
        max_pixels: int | None = None,
    ):
        if not os.fspath(root):
            raise ValueError("the name of the folder of images is empty")
        self.root = Path(root)
        self.labels = labels
        self.max_failed_share = max_failed_share
        self.failed: dict[Path, str] = {}
        self._reader = ImageReader(value_range, max_pixels, logger.warning)
        if not self.root.is_dir():
            kind = f"{kind_of(self.root.stat().st_mode)}, " if self.root.exists() else ""
            raise ValueError(f"{shown(self.root)} is {kind}not a folder")
        left_out = LeftOut()
        known = endings()
        self.paths = Paths(self.root, search(self.root, known, left_out))
        passed_by = left_out.line()
        if not self.paths:
            what = f"; it holds {passed_by}" if passed_by else ""
            raise ValueError(f"{shown(self.root)} holds no images ({', '.join(sorted(known))}){what}")
        if passed_by:
            warnings.warn(f"not looked at in {shown(self.root)}: {passed_by}", stacklevel=2)
        self._unreadable = SharedFlags(len(self.paths))
        self.classes: list[str] = []
        if labels:
            self._labels = self._number_classes()

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the names of all files, but not on where their common folder lies."""
        return self.paths.fingerprint()

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
        while (image := self._load(index)) is None:
            index = replacements.randrange(len(self))
        return (image, int(self._labels[index])) if self.labels else image

    def _load(self, index: int) -> Image.Image | None:
        """Image `index` itself; None where it is unreadable."""
        path = self.paths[index]
        if self._unreadable[index]:
            self._check_share(shown(path))  # another process may have met all others
            return None
        try:
            return self._reader.load(path)
        except ValueError as error:
            self._unreadable.put_up(index % len(self))
            self.failed[path] = str(error)
            if not isinstance(error, TooManyPixels):
                logger.warning("%s; another image takes its place", error)
            elif self._reader.once("pixels"):
                logger.warning("%s; another image takes its place. Others as large are not told.", error)
            self._check_share(str(error))
            return None

    def _check_share(self, last: str) -> None:
        failed = self._unreadable.sum()
        if failed > self.max_failed_share * len(self) or failed == len(self):
            raise TooManyUnreadable(
                f"{failed} of {len(self)} images in {shown(self.root)} are unreadable, "
                f"more than the allowed share of {self.max_failed_share:g}; the last one: {last}"
            )

    def _number_classes(self) -> np.ndarray:
        numbers: dict[str, int] = {}
        labels = np.empty(len(self.paths), np.int64)
        for index in range(len(self.paths)):
            top, inside, _ = os.fsdecode(self.paths.name(index)).partition("/")
            if not inside:
                stray = shown(self.paths[index])
                raise ValueError(f"labels need class folders, but {stray} lies directly in {shown(self.root)}")
            labels[index] = numbers.setdefault(top, len(numbers))
        self.classes = list(numbers)  # found in sorted order
        return labels
