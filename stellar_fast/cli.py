"""The command `stellar-fast`: one line for a user's error, a traceback for a bug."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from stellar_fast.commands.console import ended_by, fail, guard_streams, lost, say
from stellar_fast.commands.demo import demo
from stellar_fast.commands.images import encode, reconstruct, visualize
from stellar_fast.commands.info import info
from stellar_fast.commands.inspect import inspect
from stellar_fast.commands.train import train, train_decoder
from stellar_fast.commands.tune import tune
from stellar_fast.models.weights import WeightsMismatchError

_EXIT_CODES = (
    "Exit codes: 0 done; 1 what the command tells; 2 an error, told in one line; 128 + N ended by signal N (Ctrl-C: "
    "130, TERM: 143). What is done by then is kept. Lines that nobody reads (| head) change none of them: docs/cli.md."
)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="STELLAR: images as a few sparse tokens (what) and a map of where each one is.",
    epilog=_EXIT_CODES,
)


def main() -> None:
    """Entry point: like `app`, and a mistyped option is one line too, as is what standard output does not take."""
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, or that of the copy of click inside typer
    guard_streams()
    with ended_by(signal.SIGTERM):
        try:
            code = app(standalone_mode=False)
        except KeyboardInterrupt:
            code = 130
        except usage_error as error:
            message = error.format_message()
            fail(message) if message else sys.exit(2)  # without a command the help was shown
    if reason := lost():
        say("[yellow]warning:[/]", f"standard output takes no more, what is printed is lost: {reason}")
    sys.exit(code)


def register(function: Callable[..., None]) -> None:
    """Add a command whose user errors are one line on stderr and exit code 2; STELLAR_FAST_TRACEBACK=1 shows where."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say("[yellow]warning:[/]", str(message))
                function(*args, **kwargs)
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None or os.environ.get("STELLAR_FAST_TRACEBACK") == "1":
                raise
            fail(sentence)

    app.command(epilog=_EXIT_CODES)(run)


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error; None for a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        return f"memory ran out: {text[:200]}" if text else "memory ran out"
    if isinstance(error, (OSError, ValueError, NotImplementedError, WeightsMismatchError)):
        return text
    return f"{text}: a limit on processes is reached" if "can't start new thread" in text else None


for _function in (info, train, train_decoder, encode, reconstruct, visualize, demo, inspect, tune):
    register(_function)

if __name__ == "__main__":  # what torchrun starts
    main()
