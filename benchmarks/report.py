"""What a run says: progress on stderr, tables on stdout."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import Ceilings
from benchmarks.model import scaling
from benchmarks.results import Row

Line = dict[str, str]


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def show(rows: Sequence[Row], facts: Mapping[str, Any], ceilings: Ceilings) -> None:
    """One table for the models, the operators, each series of the scaling and the memory."""
    rates = ", ".join(
        f"GEMM {dtype} " + " and ".join(f"{rate:.0f} GFLOP/s by {library}" for library, rate in rates.items())
        for dtype, rates in ceilings.gemm_gflop_per_s.items()
    )
    title = (
        f"{facts['device_name']}, torch {facts['torch']}, {facts['threads']} threads, allocator {facts['allocator']}, "
        f"commit {facts['commit']}\ncopy {ceilings.copy_gb_per_s:.1f} GB/s, {rates}\n"
        "MFU: FLOPs over time, of the best GEMM; of floor: what FLOPs and bytes need at these rates, over time"
    )
    for suites in (("objective", "encode", "step", "codes", "decode", "data"), ("ops",)):
        lines = [_line(row) for row in rows if row.suite in suites]
        if lines:
            print_table(title, lines)
    for (series, dtype), grows in scaling.exponents(rows).items():
        of_series = [row for row in rows if (row.suite, row.direction, row.dtype) == ("scaling", series, dtype)]
        print_table(f"{series}, {dtype}: time grows with exponent {grows:.2f}", [_line(row) for row in of_series])
    of_memory = [row for row in rows if row.suite == "memory"]
    plain = {row.dtype: row.peak_extra_mib for row in of_memory if row.provider == "plain"}
    lines = [
        {
            "dtype": row.dtype,
            "provider": row.provider,
            "extra MiB": _number(row.peak_extra_mib),
            "of plain": f"{row.peak_extra_mib / plain[row.dtype]:.1%}",
        }
        for row in of_memory
    ]
    if lines:
        print_table(f"Prototype loss, {of_memory[0].shape}: peak beyond inputs and gradients", lines)


def _line(row: Row) -> Line:
    """A table's line, by column."""
    times: Line = {
        "median ms": _number(row.median_ms),
        "p20 - p80 ": f"{_number(row.p20_ms)} - {_number(row.p80_ms)}",
        "vs plain": f"{row.ratio:.2f}x",
        "p20 - p80": f"{row.ratio_p20:.2f} - {row.ratio_p80:.2f}",
    }
    rates: Line = {
        "GFLOP": _number(row.flops / 1e9),
        "TFLOP/s": _number(row.gflop_per_s / 1e3),
        "MFU": _percent(row.mfu),
        "of floor": _percent(row.floor_share),
        "extra MiB": _number(row.peak_extra_mib),
    }
    if row.suite == "ops":
        what: Line = {"op": row.op, "shape": row.preset, "": "fwd + bwd" if "backward" in row.direction else "fwd"}
        moved = {"MB": _number(row.bytes / 1e6), "GB/s": _number(row.gb_per_s)}
        moved["of copy"] = _percent(row.gb_per_s / row.copy_gb_per_s)
        del times["p20 - p80 "], rates["MFU"]
        return what | {"dtype": row.dtype, "provider": row.provider} | times | moved | rates
    throughput = {"images/s": _number(row.images_per_s)}
    if row.suite == "scaling":
        del times["vs plain"], times["p20 - p80"]
        return {"shape": row.shape, "threads": str(row.threads)} | times | throughput | rates
    return {"suite": row.suite, "dtype": row.dtype, "provider": row.provider} | times | throughput | rates


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.0%}"


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def print_table(title: str, lines: Sequence[Line]) -> None:
    """By rich where it is installed."""
    columns = tuple(lines[0])
    cells = [tuple(line.values()) for line in lines]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*columns, title=title)
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 190).print(table)
