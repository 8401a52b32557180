"""Where tuned launch knobs are kept: one JSON file a device, the user's or an operator's committed one."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stellar_fast.files import check_writable, plain_name, shown, write_atomically

FORMAT = "stellar_fast launch knobs 1"


@dataclass(frozen=True)
class Entry:
    """What is known of one operator at one shape.

    Attributes:
        op: the operator.
        dtype: as torch prints it, without "torch.".
        shape: letters to sizes, as the operator's door asks for knobs.
        threads: that torch might use; 0 for a GPU.
        software: that knobs are measured with, "triton 3.6.0" or "torch 2.13.0".
        source: hash of the kernel's sources.
        request: dtype and shape of the operator's spec that were run.
        knobs: those in which the best config differs from the heuristic's; none where nothing beats it.
        ratio: the heuristic's time over the best one's, forward and backward.
        heuristic_ms: time of a call with the heuristic's knobs.
        best_ms: time of a call with the best knobs.
        next_ratio: that of the best candidate which was not taken, after its first rounds and where its knobs matter.
        tried: candidates that were measured.
        rejected: candidates that were wrong or crashed, with the reason.
        measured: until it is done, each candidate's ratio.
        done: whether no candidate is left.
    """

    op: str
    dtype: str
    shape: dict[str, int]
    threads: int
    software: str
    source: str
    request: str
    knobs: dict[str, Any] = field(default_factory=dict)
    ratio: float = 1.0
    heuristic_ms: float = 0.0
    best_ms: float = 0.0
    next_ratio: float = 0.0
    tried: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    done: bool = False

    @property
    def decided(self) -> bool:
        """Whether its knobs are a result: an entry is stored as soon as its shape is opened."""
        return bool(self.knobs) or self.heuristic_ms > 0

    @property
    def key(self) -> str:
        """One entry is kept of each: a later one takes its place, also one of changed sources."""
        return key(self.op, self.dtype, self.shape, self.threads, self.software)


def key(op: str, dtype: str, shape: Mapping[str, int], threads: int, software: str) -> str:
    """Of the entry for a shape's bucket, each size at the nearest of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    sizes = ",".join(f"{letter}={_bucket(size)}" for letter, size in sorted(shape.items()))
    return f"{op} {dtype} {sizes} {software}" + (f" {threads} threads" if threads else "")


def _bucket(size: int) -> int:
    """The step that is nearest as a factor: 2,170 rows count as 2,048, a width of 768 as itself."""
    below = 1 << max(0, size.bit_length() - 1)
    steps = (below, below + below // 2, 2 * below)
    return min(steps, key=lambda step: max(step / size, size / step)) if size > 2 else size


class ForeignFileError(ValueError):
    """A file that no store wrote."""


def device_file(device: str) -> str:
    """The name of a device's file."""
    return f"{plain_name(device)}.json"


def user_folder() -> Path:
    """Where the user's stores are."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Path.home raises for users without one
    return Path(cache) / "stellar_fast" / "tune"


@dataclass(frozen=True)
class Store:
    """One file. Reading it never fails: what cannot be read is set aside with a warning, if the file is the user's."""

    path: Path
    device: str
    sets_aside: bool = True

    def read(self) -> dict[str, Entry]:
        """Entries by key."""
        try:
            return self._parse(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._set_aside(str(error))
            return {}

    def check(self) -> None:
        """Raise ValueError where nothing can be written, or a file that cannot be set aside is no store."""
        check_writable(self.path.parent)
        if self.path.exists() and not self.sets_aside:
            try:
                self._parse(self.path.read_text())
            except ValueError as error:
                raise ForeignFileError(f"{shown(self.path)} holds no tuned launch knobs ({error}): it stays") from None

    def put(self, entries: Iterable[Entry]) -> None:
        """Add entries to those in the file now, whoever wrote them. Raises ValueError where none of them is kept."""
        with self._locked():
            self.check()
            found = self.read() | {entry.key: entry for entry in entries}
            self._write(found)

    def remove(self, ops: Iterable[str] = ()) -> int:
        """Forget what is known of some operators, or of all; returns how many entries that were."""
        with self._locked():
            found, ops = self.read(), set(ops)
            kept = {key: entry for key, entry in found.items() if ops and entry.op not in ops}
            if len(kept) < len(found):
                self._write(kept)
        return len(found) - len(kept)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Others wait: the folder itself is locked, so that no file is left over."""
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _parse(self, text: str) -> dict[str, Entry]:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ForeignFileError(f"its format is not {FORMAT!r}")
        if content.get("device") != self.device:
            raise ForeignFileError(f"its device is {content.get('device')!r}, not {self.device!r}")
        try:
            entries = [Entry(**entry) for entry in content["entries"]]
            return {entry.key: entry for entry in entries}
        except (AttributeError, KeyError, TypeError) as error:
            raise ForeignFileError(f"an entry does not fit: {error}") from None

    def _write(self, entries: Mapping[str, Entry]) -> None:
        ordered = [asdict(entry) for _, entry in sorted(entries.items())]
        content = {"format": FORMAT, "device": self.device, "entries": ordered}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def _set_aside(self, reason: str) -> None:
        where = "is ignored"
        if self.sets_aside:
            aside = self.path.with_name(self.path.name + ".bad")
            with contextlib.suppress(OSError):
                self.path.replace(aside)
                where = f"is set aside as {aside.name}"
        reason = f"{self.path} holds no tuned launch knobs ({reason}) and {where}; heuristics serve"
        warnings.warn(f"{reason} until `stellar-fast tune` has run", stacklevel=2)
