"""Reads files of weights: safetensors, or what torch.save wrote, of which tensors and plain values alone are taken."""

import argparse
import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stellar_fast.files import shown, utf8_path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_HEAD_BYTES = 512

_numpy_scalar = np.float64(0).__reduce__()[0]
# Bags of values and numbers, which do nothing when they are made: beside their weights, DINO and MAE keep such.
_SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

# How other files begin that bear such a name.
_FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights themselves: run git lfs pull",
    b"<": "a web page or XML, not weights: the download was answered with something else",
    b"{": "JSON text, not weights",
    b"\x1f\x8b": "gzip data: unpack it first",
    b"BZh": "bzip2 data: unpack it first",
    b"\xfd7zXZ": "xz data: unpack it first",
    b"\x28\xb5\x2f\xfd": "Zstandard data: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"\x89HDF": "HDF5, as TensorFlow and Keras write it; safetensors and files of torch.save are read",
    b"\x93NUMPY": "a NumPy array; safetensors and files of torch.save are read",
    b"GGUF": "GGUF; safetensors and files of torch.save are read",
}


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a safetensors file, or a pickled one with weights_only=True; what it begins with decides, not its name.

    Returns:
        What the file holds by name: tensors, or those of a checkpoint under the names that it gives.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no tensors by name, or that cannot be read; one sentence says what it is.
    """
    if not os.fspath(path):
        raise ValueError("the path of the weights is empty")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {shown(path)}")
    if not path.is_file():
        raise ValueError(
            f"{shown(path)} is {'a folder' if path.is_dir() else 'no regular file'}, not a file of weights"
        )
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read weights from {shown(path)}: {error.strerror}") from None
    if head[8:9] == b"{":  # behind eight bytes that are its length
        tensors = _load_safetensors(path)
    else:
        tensors = _load_pickled(path, head)
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{shown(path)} holds a {type(tensors).__name__}, not tensors by name")
    return dict(tensors)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with utf8_path(path) as name:
            return load_file(name)
    except SafetensorError as error:
        reason = f"safetensors of {path.stat().st_size:,} bytes, cut short or damaged ({error})"
        raise ValueError(f"cannot read weights from {shown(path)}: {reason}") from error


def _load_pickled(path: Path, head: bytes) -> Any:
    if problem := _problem(path, head):
        raise ValueError(f"cannot read weights from {shown(path)}: it is {problem}")
    allowed = torch.serialization.get_safe_globals()  # what the user allowed stays allowed afterwards
    try:
        # a file, and not its path: by a path's ending torch would take it for safetensors
        with torch.serialization.safe_globals([kind for kind in _SAFE if kind not in allowed]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises anything
        text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)|`add_safe_globals`,? but got <class '([\w.]+)'>", text):
        reason = (
            f"it holds Python objects ({found[1] or found[2]}), and tensors by name alone are read: save them anew by "
            "torch.save(model.state_dict(), path), or allow that class by torch.serialization.add_safe_globals"
        )
    else:
        reason = "it is damaged, cut short, or neither safetensors nor a file of torch.save"
    raise ValueError(f"cannot read weights from {shown(path)}: {reason}")


def _problem(path: Path, head: bytes) -> str:
    """Why a file is none that torch.save wrote; empty where it may be one."""
    if not head:
        return "empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in _FOREIGN.items():
        if head.startswith(start) or text.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if not head.startswith(b"PK"):
        return ""
    if not zipfile.is_zipfile(path):
        return f"cut short or damaged: a zip archive without its end, after {path.stat().st_size:,} bytes"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, not weights: save its state_dict() by torch.save"
    if not any(name.endswith("/data.pkl") for name in names):
        return f"a zip archive of {', '.join(names[:3]) or 'nothing'}: unpack it first"
    return ""


@contextlib.contextmanager
def hub_id(name: str) -> Iterator[None]:
    """One sentence where the hub does not give a repository's files: a mistyped path looks like a repository too.

    Raises:
        FileNotFoundError: with the name, and the beginning of what huggingface_hub said.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        said = next(iter(str(error).splitlines()), "")[:200]
        raise FileNotFoundError(
            f"{name} is neither a file nor a directory here, and the hub gives none: {said}"
        ) from error
