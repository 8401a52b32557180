"""`stellar-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[str, typer.Option(help="Folder for the pictures and weights.")] = "demo_out",
    seconds: Annotated[int, typer.Option(help="Longest time to train.")] = 150,
    seed: Annotated[int, typer.Option(help="Seed of weights, views and masks.")] = 0,
) -> None:
    """Train a tiny model on a few bundled photos and show what it learned (extra: photos).

    Example: [cyan]stellar-fast demo --seconds 60[/]
    """
    from stellar_fast.demo import demo as run

    if not out:
        raise ValueError("out is empty: name a folder")
    result = run(out=Path(out), seconds=seconds, seed=seed)
    if result.signal:
        raise SystemExit(128 + result.signal)
