"""What the commands over images write: where pictures go, and the file of features."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from stellar_fast.files import LONGEST_NAME, check_outputs, is_ours, lock_folder, mark, shown, write_atomically

if TYPE_CHECKING:
    import torch

# kinds of files, see stellar_fast.files.check_output
FEATURES, FIDELITY, RECONSTRUCTION, TOKENS = "features", "a measurement", "a reconstruction", "a picture of tokens"
RECORD = "metrics.json"
_LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file that safetensors reads
_LIKE_A_FILE = re.compile(r"(\.png|\.json|~)_*\Z")


def picture_name(name: str) -> str:
    """The picture of an image, by names relative to the folders of both: that of the image and ".png".

    No two images get one picture, and none gets the name of a folder that another's needs, or that of the record: what
    ends in .png or .json is a file, and a folder of such a name has "_" behind it. A name too long for ".png" goes on
    in a folder whose name ends in "~", as no other does.
    """
    *folders, file = name.split("/")
    folders = [f"{folder}_" if _LIKE_A_FILE.search(folder) else folder for folder in folders]
    raw = os.fsencode(file) + b".png"
    if len(raw) > LONGEST_NAME:
        middle = LONGEST_NAME // 2
        while raw[middle] & 0xC0 == 0x80 and middle > LONGEST_NAME // 2 - 3:  # inside of a character
            middle -= 1
        folders.append(os.fsdecode(raw[:middle]) + "~")
        raw = raw[middle:]
    return "/".join((*folders, os.fsdecode(raw)))


def pictures(
    paths: Sequence[Path], names: list[str], images: str, out: str, kind: str, overwrite: bool
) -> dict[str, Path]:
    """Where the picture of each image goes, by the image's name.

    Raises:
        ValueError: a picture would lie among the images, or take the place of something else.
    """
    if not out:
        raise ValueError("out is empty: name a folder")
    targets = [Path(out, picture_name(name)) for name in names]
    one, root = Path(images).is_file(), Path(images)
    searched = {Path(os.path.realpath(folder)) for folder in {root.parent if one else root, *(p.parent for p in paths)}}
    beside = searched | {Path(os.path.realpath(path)).parent for path in paths if path.is_symlink()}
    for folder in {Path(os.path.realpath(folder)) for folder in {target.parent for target in targets}}:
        if folder in beside or (not one and not searched.isdisjoint(folder.parents)):
            raise ValueError(
                f"out {shown(out)} lies in the folder of the images, {shown(folder)}: its pictures would mix with them"
            )
    found = check_outputs(targets, kind=kind, overwrite=overwrite, inputs=paths)
    return dict(zip(names, found, strict=True))


@contextmanager
def hold(out: str) -> Iterator[None]:
    """Make the folder and keep other processes from writing there meanwhile; ValueError where one does."""
    folder = Path(os.path.realpath(out))
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        yield


def weights_files(weights: str) -> Iterator[Path]:
    """What may be read of weights on this machine; features that were written beside them are not."""
    place = Path(weights)
    if place.is_dir():
        for path in (*place.iterdir(), *place.glob("checkpoints/*/*")):
            if path.is_file() and not is_ours(path, FEATURES):
                yield path
    else:
        yield from (place, place.parent / "config.json")


class Features:
    """Features of N images as they come, kept once, and the safetensors file of them.

    `add` copies: what an encoder returns may be a view of much more.
    """

    def __init__(self, total: int, folder: Path) -> None:
        self.names: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._total, self._folder = total, folder

    def add(self, names: list[str], features: Mapping[str, torch.Tensor]) -> None:
        """Features of some images: `sparse`, `spatial` and `cls` of each.

        Raises ValueError, now and not after hours, where the disk has no room for those of all images.
        """
        import torch

        if not self.tensors:
            self.tensors = {
                name: torch.empty(self._total, *features[name].shape[1:]) for name in ("sparse", "spatial", "cls")
            }
            self._check_room(sum(tensor.nbytes for tensor in self.tensors.values()))
        for name, tensor in self.tensors.items():
            tensor[len(self.names) : len(self.names) + len(names)] = features[name]
        self.names += names

    def _check_room(self, size: int) -> None:
        folder, free = self._room()
        if free < size:
            raise ValueError(
                f"the features of {self._total:,} images need {size / 2**20:,.1f} MiB, and {shown(folder)} has "
                f"{free / 2**20:,.1f} MiB free: another --out, or a part with --limit"
            )

    def _room(self) -> tuple[Path, int]:
        """The folder, or the first above it that exists, and the bytes that are free in it."""
        folder = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        return folder, shutil.disk_usage(folder).free

    def cut_to_room(self) -> bool:
        """Keep the images that the disk has room for, or half where it says that all fit (a quota); False: none."""
        of_names = 3 * len(json.dumps(_json(self.names))) // max(1, len(self.names))  # names differ in length
        of_each = sum(tensor[:1].nbytes for tensor in self.tensors.values()) + of_names
        fit = max(0, self._room()[1] - 2**16) // of_each
        del self.names[fit if fit < len(self.names) else len(self.names) // 2 :]
        return bool(self.names)

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """The file, appearing whole: float32 tensors, and in the metadata `names` (as JSON) and what is given."""
        count = len(self.names)
        entries: dict[str, object] = {"__metadata__": {"about": mark(FEATURES), **metadata, "names": _json(self.names)}}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + tensor[:count].nbytes
            entries[name] = {"dtype": "F32", "shape": [count, *tensor.shape[1:]], "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)

        # Not by safetensors: it needs the whole file in memory once more, and orders the metadata by chance, so that
        # `about` might stand behind megabytes of names.
        def parts(file: IO[bytes]) -> None:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for tensor in self.tensors.values():
                file.write(tensor[:count].numpy().data)

        write_atomically(path, parts, 8 + len(header) + end)


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError where the file of features could not hold so many names."""
    size = len(json.dumps(_json(list(names))))
    if size > _LONGEST_HEADER - 10_000:  # for the rest
        raise ValueError(
            f"the names of the images are {size / 1e6:,.0f} MB, and safetensors reads files with 100 MB of them: "
            "encode a part of the images in each file, with --limit and --skip"
        )


def _json(names: list[str]) -> str:
    return json.dumps(names)  # in ASCII, where names that are no UTF-8 are kept by their escapes
