"""The files of a folder: found in order, and kept as bytes. Python objects would cost every worker their memory."""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from stellar_fast.files import shown

# Folders that systems and programs make for themselves, in small letters. Others of them begin with a dot.
MADE_BY_SYSTEMS = frozenset(
    (
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "lost+found",
        "system volume information",
    )
)
MOST_SHOWN = 5  # endings that one line names
READERS = {".heic": "pillow-heif", ".heif": "pillow-heif"}  # packages that read what Pillow alone does not


class Paths(Sequence[Path]):
    """Files below a folder as a sequence of Path, which are made when they are asked for.

    Args:
        root: the folder.
        names: relative to it, in the order of their paths.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        blob, ends = bytearray(), array("q", (0,))
        for name in names:
            blob += os.fsencode(name)
            ends.append(len(blob))
        bounds = np.array(ends)
        self._root, self._blob, self._starts, self._ends = root, bytes(blob), bounds[:-1], bounds[1:]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "Path | Paths":
        if not isinstance(index, slice):
            return Path(self._root, os.fsdecode(self.name(index)))
        part = Paths(self._root, ())
        part._blob, part._starts, part._ends = self._blob, self._starts[index], self._ends[index]
        return part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} paths in {shown(self._root)}>"

    def name(self, index: int) -> bytes:
        """A name as the system holds it, relative to the folder; IndexError where there is none."""
        return self._blob[self._starts[index] : self._ends[index]]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on all names and their order, but not on where their common folder lies."""
        if not len(self):
            return hashlib.sha256().hexdigest()[:16]
        ends = [os.path.dirname(b"/" + self.name(index)) for index in (0, -1)]  # all others lie between them
        skip = len(os.path.commonpath(ends).rstrip(b"/"))
        digest = hashlib.sha256(self.name(0)[skip:])
        for index in range(1, len(self)):
            digest.update(b"\n" + self.name(index)[skip:])
        return digest.hexdigest()[:16]


class LeftOut:
    """What a search passed by, in numbers, but for hidden files and folders."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.irregular = 0
        self.folders = 0
        self.reason = ""  # of the first folder

    def line(self) -> str:
        """The same as words; empty where there was nothing."""
        parts = []
        most = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))[:MOST_SHOWN]
        for ending, count in most:
            reader = READERS.get(ending)
            how = f" (no reader is installed: pip install {reader})" if reader else ""
            parts.append(f"{count:,} {shown(ending) or 'without ending'}{how}")
        rest = sum(self.endings.values()) - sum(count for _, count in most)
        parts += [f"{rest:,} of other endings"] if rest else []
        parts += [f"{self.irregular:,} FIFOs, sockets, devices or broken links"] if self.irregular else []
        folders = "folder" if self.folders == 1 else "folders"
        parts += [f"{self.folders:,} unopened {folders} ({self.reason})"] if self.folders else []
        return ", ".join(parts)


def search(root: Path, endings: Collection[str], left_out: LeftOut) -> Iterator[str]:
    """Names of the files below a folder, relative to it, in the order of their paths.

    Hidden files and folders and those of MADE_BY_SYSTEMS are passed by. Links are followed; a folder that several lead
    to is searched once.

    Args:
        root: the folder.
        endings: of the files that are wanted, in small letters.
        left_out: counts what else is there.

    Raises:
        ValueError: the folder itself cannot be opened.
    """
    seen: set[tuple[int, int]] = set()

    def entries(prefix: str) -> Iterator[tuple[str, bool]]:
        files, folders = [], set()
        folder = os.path.join(root, prefix)
        try:
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:
                return
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(folder) as listed:
                for entry in listed:
                    if entry.name.startswith("."):
                        continue
                    kind, ending = _kind(entry), os.path.splitext(entry.name)[1].lower()
                    if kind == "folder":
                        if entry.name.lower() not in MADE_BY_SYSTEMS:
                            folders.add(entry.name)
                    elif ending not in endings:
                        left_out.endings[ending] += 1
                    elif kind == "file":
                        files.append(entry.name)
                    else:
                        left_out.irregular += 1
        except OSError as error:
            if not prefix:
                raise ValueError(f"{shown(root)} cannot be searched: {error.strerror}") from error
            left_out.folders += 1
            left_out.reason = left_out.reason or f"{shown(folder)}: {error.strerror}"
        for name in sorted([*files, *folders]):
            yield name, name in folders

    stack = [("", entries(""))]
    while stack:
        prefix, here = stack[-1]
        name, is_folder = next(here, ("", False))
        if not name:
            stack.pop()
        elif is_folder:
            stack.append((f"{prefix}{name}/", entries(f"{prefix}{name}/")))
        else:
            yield prefix + name


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else ""
    except OSError:  # links in a circle
        return ""
