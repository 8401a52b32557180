"""`stellar-fast inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stellar_fast.commands.console import console, end_printed, tell, text

if TYPE_CHECKING:
    from stellar_fast.aot import Figures
    from stellar_fast.resources import Resources


def inspect(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Operators; none: all.")] = None,
    arch: Annotated[str, typer.Option(help="GPU generations, with commas between.")] = "sm_80,sm_90,sm_100",
    every_shape: Annotated[
        bool, typer.Option("--all", help="Every named shape in every dtype; otherwise b16 in bf16 and fp32.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a kernel and architecture.")] = False,
) -> None:
    """Compile Triton kernels ahead of time, without a GPU: registers, shared memory, spills, instructions, occupancy.

    The exit code is 1 where a kernel spills registers, multiplies 16-bit matrices without tensor cores, or takes more
    shared memory than the GPU has. Without OP the kernels of the native module's CUDA half are listed too, where it has
    one: they must not spill either.

    Example: [cyan]stellar-fast inspect lowrank_product --arch sm_90[/]
    """
    from stellar_fast import aot

    figures = aot.inspect(ops or (), [name.strip() for name in arch.split(",")], every_shape)
    if as_json:
        print(json.dumps([asdict(row) for row in figures], indent=1))
    else:
        _show(figures)
    compiled = [] if ops or as_json else _show_native()
    if any(row.problems for row in figures) or any(row.problems for row in compiled):
        raise SystemExit(1)
    end_printed()


def _show(figures: Sequence[Figures]) -> None:
    names = ("registers", "shared KiB", "spills", "tensor cores", "128-bit loads", "occupancy")
    for op, rows in groupby(figures, key=lambda row: row.op):
        table = Table(title=op, title_justify="left")
        table.add_column("kernel", no_wrap=True)
        for name in ("shape", "dtype", "arch", *names):
            table.add_column(name)
        for _, section in groupby(rows, key=lambda row: (row.shape, row.dtype, row.arch)):
            for row in section:
                cores = " ".join(f"{name} {count}" for name, count in row.tensor_core.items())
                numbers = (
                    str(row.registers),
                    f"{row.shared_bytes / 1024:.1f}",
                    str(row.spills),
                    cores or "-",
                    f"{row.loads_128} of {row.loads}",
                    f"{row.occupancy:.0%}",
                )
                style = "red" if row.problems else None
                table.add_row(row.kernel, row.shape, row.dtype, row.arch, *numbers, style=style)
            table.add_section()
        console.print(table)
    for row in figures:
        for problem in row.problems:
            where = f"{row.kernel} {row.shape} {row.dtype} {row.arch} ({row.config})"
            console.print(text(f"{where}: {problem}"), style="red", soft_wrap=True)


def _show_native() -> list[Resources]:
    """The kernels of `stellar_fast._C`."""
    from stellar_fast import resources

    try:
        kernels = resources.of_native_module()
    except ValueError as error:
        tell(f"CUDA C++ kernels are not listed: {error}")
        return []
    for op, rows in groupby(kernels, key=lambda row: row.op):
        table = Table(title=f"{op} (CUDA C++)", title_justify="left")
        for name in ("kernel", "arch", "registers", "shared KiB", "local bytes"):
            table.add_column(name)
        for row in rows:
            shared = f"{row.shared_bytes / 1024:.1f}"
            style = "red" if row.problems else None
            cells = (text(row.kernel), row.arch, str(row.registers), shared, str(row.local_bytes))
            table.add_row(*cells, style=style)
        console.print(table)
    for row in kernels:
        for problem in row.problems:
            console.print(text(f"{row.op} {row.kernel} {row.arch}: {problem}"), style="red", soft_wrap=True)
    return kernels
