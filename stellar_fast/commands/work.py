"""Work on one image after another, of which nothing that is done gets lost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from stellar_fast.commands.console import Progress, tell
from stellar_fast.files import command_line
from stellar_fast.train.signals import Stop, stop_on_signals


class Work:
    """How far the work on images of these names is.

    `done` counts images, those that could not be read included; `has_results` where one could.
    """

    has_results = False

    def __init__(self, names: list[str], stop: Stop, progress: Progress) -> None:
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._stop, self._progress = stop, progress

    @property
    def stopping(self) -> bool:
        """Whether a signal asks to leave the rest."""
        return self._stop.requested

    @property
    def done(self) -> int:
        return self._progress.done

    def finished(self, name: str) -> None:
        """Everything up to this image is done."""
        self.has_results = True
        self.passed(name)

    def back_to(self, name: str) -> None:
        """What comes after this image was done in vain."""
        self.passed(name)

    def passed(self, name: str) -> None:
        """`finished`, but maybe none could be read."""
        self._progress.update(self._numbers[name])


@contextmanager
def keeping(
    context: typer.Context, names: list[str], write: Callable[[Work], Exception | None], rest_elsewhere: bool = True
) -> Iterator[Work]:
    """Call `write` at the end of the block, and where a signal or an error ends it early, once an image is done.

    Then one line says how to go on. A signal ends the command with 128 and its number; a second one ends it at once.

    Args:
        context: of the command, which has the options --skip, --limit and --out.
        names: of the images.
        write: keeps what is done. Where that is not all, `Work.back_to` says so, and it returns the reason.
        rest_elsewhere: whether what is left has to go to another --out, since `write` would replace what is there.
    """

    def end() -> None:
        problem = write(work) if work.has_results else None
        if 0 < work.done < len(names):
            how = _rest(context, work.done, rest_elsewhere)
            tell(f"{work.done:,} of {len(names):,} images are done; go on with: {how}")
        if problem:
            raise problem

    with stop_on_signals() as stop:
        try:
            with Progress(len(names), "images") as progress:
                work = Work(names, stop, progress)
                yield work
        except Exception:
            end()
            raise
        end()
    if stop.signal:
        raise SystemExit(128 + stop.signal)


def _rest(context: typer.Context, done: int, elsewhere: bool) -> str:
    """The command line for what is left."""
    given = context.params
    skip = given["skip"] + done
    changes = {"skip": skip, "limit": given["limit"] and given["limit"] - done}
    if elsewhere:
        stem, ending = os.path.splitext(given["out"].rstrip("/"))
        changes["out"] = re.sub(r"-from-\d+\Z", "", stem) + f"-from-{skip}{ending}"
    return command_line(["stellar-fast", str(context.info_name), *_options(context, given | changes)])


def _options(context: typer.Context, values: dict[str, Any]) -> Iterator[str]:
    """The words of a command line that give options these values."""
    for option in context.command.params:
        value = values.get(option.name or "")
        if option.name in values and value != option.default:
            names = option.opts if value is not False else option.secondary_opts
            yield names[0]
            if not isinstance(value, bool):
                yield from map(str, value if isinstance(value, tuple) else (value,))
