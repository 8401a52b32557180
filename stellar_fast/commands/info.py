"""`stellar-fast info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from rich.markup import escape
from rich.table import Table

from stellar_fast.commands.console import console


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
        facts.add_row(
            f"cuda:{i}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        facts.add_row("cuda", "no device")
    console.print(facts)

    build = _facts("Native module stellar_fast._C")
    if native.available():
        for name, value in native.build_info().items():
            build.add_row(name, escape(str(value)))
        build.add_row("openmp loaded", ", ".join(native.openmp_libraries()) or "unknown")
    else:
        build.add_row("not available", escape(native.reason()))
    console.print(build)

    backends = Table("operator", "backend", "", "reason", title="Backends", title_justify="left")
    for op, name, available, reason in backend.describe():
        backends.add_row(op, name, "[green]yes[/]" if available else "[red]no[/]", escape(reason))
    console.print(backends)


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
