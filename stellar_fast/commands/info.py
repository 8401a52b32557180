"""`stellar-fast info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from stellar_fast.commands.console import console, end_printed, sentence, tell, text

if TYPE_CHECKING:
    from stellar_fast.backend import Row


def info() -> None:
    """Versions, devices, and which backend every operator takes and why not another.

    Example: [cyan]stellar-fast info[/]
    """
    import torch

    from stellar_fast import backend, native

    facts = _facts("This machine")
    facts.add_row("stellar-fast", _version("stellar-fast"))
    facts.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    facts.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    for package in ("triton", "numpy", "pillow", "safetensors"):
        facts.add_row(package, _version(package))
    facts.add_row(
        "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        size = f"{device.total_memory / 2**30:.0f} GiB"
        facts.add_row(f"cuda:{i}", text(f"{device.name}, sm_{device.major}{device.minor}, {size}"))
    if not torch.cuda.is_available():
        facts.add_row("cuda", "no device")
    console.print(facts)

    build = _facts("Native module stellar_fast._C")
    if native.available():
        for name, value in native.build_info().items():
            build.add_row(name, text(value))
        build.add_row("openmp loaded", text(", ".join(native.openmp_libraries()) or "unknown"))
    else:
        build.add_row("not available", sentence(native.reason()))
    console.print(build)

    machine = Table("backend", "", "why not", title="Backends on this machine", title_justify="left")
    for name in backend.BACKENDS:
        reason = backend.why_not(name)
        machine.add_row(name, "[red]no[/]" if reason else "[green]yes[/]", sentence(reason))
    console.print(machine)
    console.print(_launch_knobs())
    table, notes = _operators(backend.describe())
    console.print(table)
    for number, reason in enumerate(notes, start=1):
        tell(f"  ({number}) {reason}")
    end_printed()


def _launch_knobs() -> Table:
    """Where operators take theirs from on each device."""
    import torch

    from stellar_fast import backend
    from stellar_fast.tune import lookup

    table = Table(title="Launch knobs, entries in use of those kept", title_justify="left")
    for header in ("device", "tuned here", "committed", "else"):
        table.add_column(header, overflow="fold")
    mode = os.environ.get(lookup.VARIABLE) or "cache"
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        name = lookup.device_name(device)
        committed = [entry for op in backend.OPS for entry in lookup.committed_store(op, name).read().values()]
        counts = [
            f"{sum(lookup.is_current(entry, device) for entry in entries)} of {len(entries)}"
            for entries in (lookup.user_store(name).read().values(), committed)
        ]
        serves = f"heuristic, for all: {lookup.VARIABLE}={mode}" if mode == "off" else "nearest shape, heuristic"
        table.add_row(text(name), *counts, text(serves))
    return table


def _operators(rows: Sequence[Row]) -> tuple[Table, list[str]]:
    """The backends that are written for each operator, and the reasons that its cells refer to by number."""
    table = Table(title="Operators", title_justify="left")
    table.add_column("operator", no_wrap=True)
    for header in ("in use", "works too", "not here"):
        table.add_column(header)
    notes: list[str] = []

    def refer(reason: str) -> str:
        if reason not in notes:
            notes.append(reason)
        return f"({notes.index(reason) + 1})"

    for op in dict.fromkeys(row.op for row in rows):
        written = [row for row in rows if row.op == op and row.written]
        taken = [f"[bold green]{row.backend}[/]" for row in written if row.reason == "in use"]
        refused = {row.reason.removeprefix("works; ") for row in written if row.reason.startswith("works; ")}
        others = [row.backend for row in written if row.available and row.reason != "in use"]
        absent = [f"{row.backend} {refer(row.reason)}" for row in written if not row.available]
        in_use = taken or [f"[red]none[/] {refer(reason)}" for reason in refused]
        table.add_row(op, ", ".join(in_use), ", ".join(others), ", ".join(absent))
    return table, notes


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
