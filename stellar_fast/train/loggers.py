"""Where the numbers of a run go: metrics.jsonl, the terminal, TensorBoard.

A record is the dictionary of one step: `step`, `epoch`, `progress` (share of the run, 0 to 1), `seconds`,
`images_per_second`, `lr`, `grad_norm`, `loss`, every named loss and metric of the model, and for a step that was left
out `skipped`: the names of the terms that were not finite.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stellar_fast.files import null_if_not_finite, write_atomically

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
        try:
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of metrics: {error!r}") from error
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a")
        self._every = every
        self._first = True
        self._unwritten: Record | None = None

    def log(self, record: Record) -> None:
        self._unwritten = record
        if self._first or record["step"] % self._every == 0 or "skipped" in record:
            self._write(record)
        self._first = False

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(null_if_not_finite(record)) + "\n")
        self._file.flush()
        self._unwritten = None

    def close(self) -> None:
        if self._unwritten:
            self._write(self._unwritten)
        self._file.close()


def _numbers(record: Record) -> list[str]:
    """What a line shows: every loss and metric that is one number."""
    return [name for name, value in record.items() if name not in _ABOUT_THE_STEP and not isinstance(value, list)]


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file, without a last one that a killed process left unfinished."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]


class TensorBoard:
    """Scalars of every `every`-th step as TensorBoard events, those of a list as `name/0`, `name/1`, and so on.

    `resume_step` hides what an interrupted run wrote of later steps. ValueError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, every: int, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"TensorBoard cannot be imported ({error}): pip install 'stellar-fast[log]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
        self._every = every

    def log(self, record: Record) -> None:
        if record["step"] % self._every == 0 and "skipped" not in record:
            for name, value in record.items():
                if isinstance(value, list):
                    for i, x in enumerate(value):
                        self._writer.add_scalar(f"{name}/{i}", x, record["step"])
                elif name not in ("step", "seconds"):
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class RichProgress:
    """A live bar with speed and remaining time over a table of every number; plain lines where there is no terminal."""

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
            Live(self._progress, console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        )

    def log(self, record: Record) -> None:
        self._skipped += "skipped" in record
        if self._live:
            self._live.start()  # at the first record: only the process that reports shows a bar
            speed = record["images_per_second"]
            self._progress.update(self._task, completed=record["progress"], step=record["step"], speed=speed)
            self._live.update(Group(self._progress, self._table(record)))
        elif record["step"] % self._every == 0 or "skipped" in record:
            self._console.print(self._line(record), soft_wrap=True, highlight=False)

    def close(self) -> None:
        if self._live:
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
