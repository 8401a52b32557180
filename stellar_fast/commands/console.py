"""Where the commands speak: what is lost on the way to a terminal, a pipe or a file costs nothing but itself."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from stellar_fast.files import printable

INTERVAL_S = 30.0  # between lines of progress where there is no terminal

console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with one line on stderr."""
    say("[bold red]error:[/]", message)
    raise SystemExit(code)


def say(kind: str, message: str) -> None:
    """One line on stderr, whatever lines and controls the message had."""
    errors.print(kind, sentence(message), soft_wrap=True, highlight=False)


def tell(message: str) -> None:
    """One line on stdout, as it stands."""
    console.print(text(message), soft_wrap=True)


def text(value: object) -> Text:
    """Anything for a line or the cell of a table: no markup, nothing that a terminal obeys."""
    return Text(printable(str(value)))


def sentence(message: str) -> Text:
    """`text` of a message that may have line breaks."""
    return text(" ".join(message.split()))


def end_printed() -> None:
    """End a command whose result is what it prints: with code 1 where that was lost, unless the reader went away."""
    if reason := lost():
        fail(f"standard output takes no more: {reason}", code=1)


def lost() -> str:
    """Why standard output did not take everything; "" where it did, or where its reader has gone away."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    return error.strerror if error and error.errno != errno.EPIPE else ""


@contextmanager
def ended_by(number: int) -> Iterator[None]:
    """Let a signal that would end the process end the block, which cleans up; then exit with 128 and its number."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.getsignal(number)
    if before is signal.SIG_DFL:
        signal.signal(number, end)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(number, before)


def guard_streams() -> None:
    """Make standard output and standard error take everything: what cannot be encoded is escaped, or written, lost.

    Streams that somebody has put in their place stay.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        # A closed one has no stream, and its number would be that of the next file: this one, which takes nothing.
        handle = os.open(os.devnull, os.O_RDONLY) if stream is None else stream.fileno()
        if name != "stdin":
            if stream:
                stream.flush()
            encoding = stream.encoding if stream else "utf-8"
            buffer = io.BufferedWriter(_Losing(handle, "w", closefd=False))
            guarded = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, guarded)


class _Losing(io.FileIO):
    """A file that accepts what it cannot write. `error` says why not, of the first time."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # full, and does not block
                select.select((), (self,), ())
            return count
        except OSError as error:
            self.error = self.error or error
            return len(data)


class Progress:
    """How far a command is, on stderr: a bar on a terminal, elsewhere a plain line every `interval_s`.

    "128 of 5,000 images, 4.2 images/s, 19 min left"
    """

    def __init__(
        self,
        total: int,
        unit: str,
        interval_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done = total, 0
        self._unit, self._clock = unit, clock
        self._interval_s = INTERVAL_S if interval_s is None else interval_s
        self._start = self._told = clock()
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[speed]}")
        about = TextColumn("{task.fields[about]}", markup=False)
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Bar(*columns, about, *times, console=errors, transient=True, disable=not errors.is_terminal)
        self._task = self._bar.add_task("", total=total, speed="", about="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, about: str = "") -> None:
        """So many are done; `about` says what is going on."""
        self.done = done
        now = self._clock()
        count = f"{done:,} of {self.total:,} {self._unit}"
        rate = done / (now - self._start) if done and now > self._start else 0.0
        speed = f"{rate:,.1f} {self._unit}/s" if rate >= 1 else f"{rate:.2g} {self._unit}/s"
        self._bar.update(self._task, completed=done, description=count, speed=speed if rate else "", about=about)
        if not errors.is_terminal and now - self._told >= self._interval_s:
            self._told = now
            parts = [count, speed, f"{duration((self.total - done) / rate)} left"] if rate else [count]
            errors.print(text(", ".join(parts) + (f": {about}" if about else "")), soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as one reads it: 40 s, 19 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
