"""Which launch knobs a call takes.

The first of these that fits: what a tuner forces; the user's store; the operator's committed store; the nearest shape
in either; the heuristic. Stored knobs are taken only for the same device, dtype, threads, software and kernel sources,
and where they are valid at the shape asked for. A shape is looked up once in a process.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stellar_fast import native
from stellar_fast.backend import OPS, interpreting
from stellar_fast.kernels.common import threads as _threads
from stellar_fast.tune.store import Entry, Store, device_file, key, user_folder

VARIABLE = "STELLAR_FAST_TUNE"
# Factor of a nearest shape's distance, over all of its sizes together: what is best there says little further away.
FARTHEST = 4.0
MOST_KEPT = 4096  # shapes of a process, before all are looked up anew
_CPU = torch.device("cpu")

_kept: dict[tuple, Any] = {}
_forced: dict["Problem", Any] = {}
_asked: set["Problem"] | None = None
_warned = False


class Problem(NamedTuple):
    """What a door asks knobs for; `config` is the module with heuristic, candidates and is_valid."""

    op: str
    config: types.ModuleType
    shape: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    device: torch.device

    def heuristic(self) -> Any:
        return self.config.heuristic(dict(self.shape), self.dtype, self.device)

    def candidates(self) -> Iterator[Any]:
        return self.config.candidates(dict(self.shape), self.dtype)

    def is_valid(self, config: Any) -> bool:
        return self.config.is_valid(config, dict(self.shape), self.dtype)


class Found(NamedTuple):
    """Launch knobs and where they are from: "user", "committed", "nearest" or "heuristic"."""

    config: Any
    source: str


def threads(op: str, shape: Mapping[str, int], dtype: torch.dtype) -> _threads.Config:
    """Threads of an operator's C++."""
    return knobs(op, _threads, shape, dtype, _CPU)


def knobs(op: str, config: types.ModuleType, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    """The launch knobs of a call, a `config.Config`: what doors ask instead of ``config.heuristic``."""
    if _asked is not None or _forced:
        problem = Problem(op, config, tuple(shape.items()), dtype, device)
        if _asked is not None:
            _asked.add(problem)
        if problem in _forced:
            return _forced[problem]
    place = (op, config, *shape.items(), dtype, device, torch.get_num_threads(), os.environ.get(VARIABLE))
    found = _kept.get(place)
    if found is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        found = _kept[place] = find(Problem(op, config, tuple(shape.items()), dtype, device)).config
    return found


@contextlib.contextmanager
def force(problem: Problem, config: Any) -> Iterator[None]:
    """Let one problem take these knobs in the block, in every thread: a backward runs in one of its own."""
    before = dict(_forced)
    _forced[problem] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def observe() -> Iterator[set[Problem]]:
    """Collect what knobs are asked for in the block."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


def forget() -> None:
    """Read the stores again when they are next asked."""
    _kept.clear()
    _read.cache_clear()


def find(problem: Problem) -> Found:
    """Look a problem up, at the cost of some 100 us where anything is stored."""
    mode = os.environ.get(VARIABLE) or "cache"
    if mode not in ("cache", "off"):
        raise ValueError(f"{VARIABLE} must be 'cache' or 'off' but is {mode!r}")
    if mode == "cache" and not interpreting():
        found = _stored(problem)
        if found is not None:
            return found
    return Found(problem.heuristic(), "heuristic")


def _stored(problem: Problem) -> Found | None:
    op, device = problem.op, device_name(problem.device)
    shape, dtype = dict(problem.shape), name_of(problem.dtype)
    near: list[tuple[float, Entry]] = []
    of_user, committed = _read(user_store(device)), _read(committed_store(op, device))
    if not of_user and not committed and problem.device.type == "cuda":
        _warn_once(device)
    place = key(op, dtype, shape, **state(problem.device)) if of_user or committed else ""
    for source, entries in (("user", of_user), ("committed", committed)):
        exact = entries.get(place)
        if exact is not None and exact.decided and (config := _usable(exact, problem)) is not None:
            return Found(config, source)
        decided = [entry for entry in entries.values() if entry.op == op and entry.decided]
        near += [(distance(entry.shape, shape), entry) for entry in decided]
    for far, entry in sorted(near, key=lambda pair: pair[0]):
        if far > math.log2(FARTHEST):
            break
        if entry.dtype == dtype and (config := _usable(entry, problem)) is not None:
            return Found(config, "nearest")
    return None


def is_current(entry: Entry, device: torch.device) -> bool:
    """Whether an entry was measured with the kernel and software of now."""
    now = state(device) | {"source": source_hash(entry.op, device.type)}
    return all(getattr(entry, name) == value for name, value in now.items())


def _usable(entry: Entry, problem: Problem) -> Any:
    """The knobs of an entry, where they are still those of this kernel and valid here."""
    if not is_current(entry, problem.device):
        return None
    start, hints = problem.heuristic(), typing.get_type_hints(problem.config.Config)
    try:
        config = replace(start, **{name: from_json(hints[name], value) for name, value in entry.knobs.items()})
    except (AttributeError, KeyError, TypeError, ValueError):  # of an earlier version of the knobs
        return None
    return config if problem.is_valid(config) else None


def distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Of two shapes, the logarithms of their sizes' ratios added up; infinite between shapes with other letters."""
    if one.keys() != other.keys():
        return math.inf
    return sum(abs(math.log2(max(one[letter], 1) / max(other[letter], 1))) for letter in one)


def _warn_once(device: str) -> None:
    global _warned
    if not _warned and not any(committed_store(op, device).path.exists() for op in OPS):
        _warned = True
        advice = "`stellar-fast tune --device cuda` measures them, STELLAR_FAST_TUNE=off silences this"
        warnings.warn(f"no tuned launch knobs for {device}: heuristics serve; {advice}", stacklevel=2)


def user_store(device: str) -> Store:
    """The user's store of a device."""
    return Store(user_folder() / device_file(device), device)


def committed_store(op: str, device: str) -> Store:
    """What is committed of an operator for a device."""
    return Store(room(op) / "configs" / device_file(device), device, sets_aside=False)


@functools.cache
def _read(store: Store) -> dict[str, Entry]:
    return store.read()


def room(op: str) -> Path:
    """The folder of an operator's kernels."""
    return Path(str(importlib.import_module(f"stellar_fast.kernels.{op}").__file__)).parent


def check_checkout() -> None:
    """Raise ValueError unless the kernels that run are those of a source checkout."""
    kernels = room("linear").parent
    if not (kernels.parent / "pyproject.toml").exists():
        raise ValueError(f"--commit needs a source checkout, but the kernels that run are installed in {kernels}")


def state(device: torch.device) -> dict[str, Any]:
    """What else timings depend on: threads and software."""
    if device.type == "cuda":
        return {"threads": 0, "software": f"triton {_version('triton')}"}
    return {"threads": torch.get_num_threads(), "software": f"torch {torch.__version__}"}


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def source_hash(op: str, device: str) -> str:
    """Of what computes an operator on a type of device: its room but reference and spec, what rooms share, its door and
    that of `linear`, which others multiply with, and on a CPU the C++ as it was built."""
    folder, found = room(op), hashlib.sha256(native.source_hash(op).encode() if device == "cpu" else b"")
    doors = (Path(native.__file__).parent / "ops" / f"{name}.py" for name in {op, "linear"})
    for path in sorted([*folder.glob("*.py"), *(folder.parent / "common").glob("*.py"), *doors]):
        if path.name not in ("__init__.py", "reference.py", "spec.py"):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of a GPU or of this processor; a virtual machine often hides the latter, hence its family and model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        lines = re.findall(r"^(.+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.MULTILINE)
        facts = dict(reversed(lines))
        if {"model name", "cpu family", "model"} <= facts.keys():
            return f"{facts['model name']} family {facts['cpu family']} model {facts['model']}"
    return platform.processor() or platform.machine()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_json(kind: Any, data: Any) -> Any:
    """A config of type `kind` from what `dataclasses.asdict` made of one. Raises ValueError where they do not fit."""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            raise ValueError(f"{json.dumps(data)} is no {kind}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_json(hints[name], data[name]) for name in names})  # type: ignore[operator]
    if isinstance(kind, types.UnionType):
        (some,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        return None if data is None else from_json(some, data)
    if type(data) is not kind:
        raise ValueError(f"{json.dumps(data)} is no {kind}")
    return data
