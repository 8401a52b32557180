"""Where the commands speak."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with one line on stderr."""
    say("[bold red]error:[/]", message)
    raise SystemExit(code)


def say(kind: str, message: str) -> None:
    """One line on stderr, whatever lines the message had."""
    errors.print(f"{kind} {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)
