"""Where the numbers of a run go: metrics.jsonl, the terminal, TensorBoard.

A record is the dictionary of one step: `step`, `epoch`, `progress` (share of the run, 0 to 1), `seconds`,
`images_per_second`, `lr`, `grad_norm`, `loss`, every named loss and metric of the model, and for a step that was left
out `skipped`: the names of the terms that were not finite.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stellar_fast.files import explained, null_if_not_finite, shown, utf8_path, write_atomically

Record = dict[str, Any]  # a metric of several numbers, such as matched_tokens, is a list
_ABOUT_THE_STEP = ("step", "epoch", "progress", "seconds", "images_per_second", "skipped")


class Logger(Protocol):
    """What `train` reports to. `log` is called once for every step, `close` at the end whatever happened."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends the first, every `every`-th and the last record, and every skipped step, to a file: a JSON object a
    line, null for not finite.

    `resume_step` drops lines of later steps, which an interrupted run may have written after its last checkpoint.
    """

    def __init__(self, path: Path, every: int, resume_step: int = 0) -> None:
        kept = [line for line in read_records(path) if json.loads(line)["step"] <= resume_step]
        write_atomically(path, b"".join(line + b"\n" for line in kept))
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._every = every
        self._first = True
        self._unwritten: Record | None = None

    def log(self, record: Record) -> None:
        self._unwritten = record
        if self._first or record["step"] % self._every == 0 or "skipped" in record:
            self._write(record)
        self._first = False

    def _write(self, record: Record) -> None:
        line = json.dumps(null_if_not_finite(record)).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)  # a file of whole lines
            raise explained(error, self._path, len(line)) from error
        self._unwritten = None

    def close(self) -> None:
        with self._file:
            if self._unwritten:
                self._write(self._unwritten)


def read_records(path: Path) -> list[bytes]:
    """The lines of a metrics.jsonl, without a last one that a killed process left unfinished; none of a missing file.

    Raises:
        ValueError: a file that `JsonLines` did not write.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{shown(path)} is not a file of metrics: it is no file")
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    try:
        for line in lines:
            record = json.loads(line)
            if not (isinstance(record["step"], int) and {"progress", "seconds", "images_per_second"} <= record.keys()):
                raise ValueError(f"it holds {record}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shown(path)} is not a file of metrics: {error!r}") from error
    return lines


def _numbers(record: Record) -> list[str]:
    """What a line shows: every loss and metric that is one number."""
    return [name for name, value in record.items() if name not in _ABOUT_THE_STEP and not isinstance(value, list)]


class TensorBoard:
    """Scalars of every `every`-th step as TensorBoard events, those of a list as `name/0`, `name/1`, and so on.

    `resume_step` hides what an interrupted run wrote of later steps. ValueError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, every: int, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        name = self._open.enter_context(utf8_path(folder))
        self._writer = self.writer()(name, purge_step=resume_step + 1 if resume_step else None)
        self._folder = folder
        self._every = every

    @staticmethod
    def writer() -> Any:
        """TensorBoard's class that writes events."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"TensorBoard cannot be imported ({error}): pip install 'stellar-fast[log]'") from error
        return SummaryWriter

    def log(self, record: Record) -> None:
        if record["step"] % self._every == 0 and "skipped" not in record:
            with self._errors_explained():
                for name, value in record.items():
                    if isinstance(value, list):
                        for i, x in enumerate(value):
                            self._writer.add_scalar(f"{name}/{i}", x, record["step"])
                    elif name not in ("step", "seconds"):
                        self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with self._open, self._errors_explained():
            self._writer.close()

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explained(error, self._folder / "events") from error


@contextlib.contextmanager
def unless_lost(console: Console) -> Iterator[None]:
    """Print; once nobody reads, the disk behind it is full or the terminal has hung up, the console falls silent."""
    try:
        yield
    except (OSError, ValueError, SystemExit):  # the last of them is rich's answer to a reader that is gone
        console.quiet = True


class _Live(Live):
    def refresh(self) -> None:  # by a thread of its own, too
        with unless_lost(self.console):
            super().refresh()


class RichProgress:
    """A live bar with speed and remaining time over a table of every number; plain lines where there is no terminal.

    Printing that fails costs what is printed alone.
    """

    def __init__(self, console: Console | None = None, every: int = 10, title: str = "training") -> None:
        self._console = console or Console()
        self._every = every
        self._progress = Progress(
            TextColumn(f"[bold]{title}[/] step {{task.fields[step]}}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]:.1f} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=1.0, step=0, speed=0.0)
        self._skipped = 0
        self._live = (
            _Live(self._progress, console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        )

    def log(self, record: Record) -> None:
        self._skipped += "skipped" in record
        with unless_lost(self._console):
            if self._live:
                self._live.start()  # at the first record: only the process that reports shows a bar
                speed = record["images_per_second"]
                self._progress.update(self._task, completed=record["progress"], step=record["step"], speed=speed)
                self._live.update(Group(self._progress, self._table(record)))
            elif record["step"] % self._every == 0 or "skipped" in record:
                self._console.print(self._line(record), soft_wrap=True, highlight=False)

    def close(self) -> None:
        if self._live:
            with unless_lost(self._console), contextlib.suppress(IndexError):  # of a display that did not come to start
                self._live.stop()

    def _table(self, record: Record) -> Table:
        names = _numbers(record)
        table = Table.grid(padding=(0, 2), expand=False)
        columns = max(1, min(4, self._console.width // 36))
        for start in range(0, len(names), columns):
            cells = []
            for name in names[start : start + columns]:
                cells += [f"[dim]{name}[/]", f"{record[name]:.4g}"]
            table.add_row(*cells)
        if self._skipped:
            table.add_row("[yellow]skipped steps[/]", str(self._skipped))
        return table

    def _line(self, record: Record) -> str:
        if "skipped" in record:
            return f"step {record['step']}: skipped, not finite: {', '.join(record['skipped'])}"
        numbers = "  ".join(f"{name} {record[name]:.4g}" for name in _numbers(record))
        percent, speed = 100 * record["progress"], record["images_per_second"]
        return f"step {record['step']}  {percent:.0f} %  {speed:.1f} images/s  {numbers}"
