"""The command `stellar-fast`: one line for a user's error, a traceback for a bug."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from stellar_fast.commands.console import fail, say
from stellar_fast.commands.demo import demo
from stellar_fast.commands.images import encode, reconstruct, visualize
from stellar_fast.commands.info import info
from stellar_fast.commands.inspect import inspect
from stellar_fast.commands.train import train, train_decoder
from stellar_fast.commands.tune import tune
from stellar_fast.models.weights import WeightsMismatchError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="STELLAR: images as a few sparse tokens (what) and a map of where each one is.",
)


def main() -> None:
    """Entry point: like `app`, and a mistyped option is one line too."""
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, or that of the copy of click inside typer
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(130)
    except usage_error as error:
        message = error.format_message()
        fail(message) if message else sys.exit(2)  # without a command the help was shown


def register(function: Callable[..., None]) -> None:
    """Add a command whose user errors are one line on stderr and exit code 2; STELLAR_FAST_TRACEBACK=1 shows where."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say("[yellow]warning:[/]", str(message))
                function(*args, **kwargs)
        except (OSError, ValueError, NotImplementedError, WeightsMismatchError) as error:
            if os.environ.get("STELLAR_FAST_TRACEBACK") == "1":
                raise
            fail(str(error))

    app.command()(run)


for _function in (info, train, train_decoder, encode, reconstruct, visualize, demo, inspect, tune):
    register(_function)

if __name__ == "__main__":  # what torchrun starts
    main()
