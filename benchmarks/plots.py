"""Pictures of a run: speed-ups, roofline, scaling curves; and of all results of a device: throughput over commits."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.model import scaling
from benchmarks.results import Row
from stellar_fast.files import write_atomically

MODELS = ("objective", "encode", "step", "codes", "decode", "data")
COLOURS = {"fp32": "tab:blue", "bf16": "tab:orange", "uint8": "tab:green"}


def draw(rows: Sequence[Row], history: Sequence[Row], folder: Path) -> list[Path]:
    """Write PNG files of what the rows have, and return their paths; none where matplotlib is not installed.

    `history` holds the rows of all runs; those of another device than the rows' are left out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    of_device = [row for row in history if row.device_name == rows[0].device_name]
    pictures: dict[str, tuple[Callable[[Figure, Sequence[Row]], None], Sequence[Row]]] = {
        "speedups": (_speedups, [row for row in rows if row.ratio == row.ratio and row.provider != "plain"]),
        "roofline": (_roofline, [row for row in rows if row.suite == "ops" and row.flops and row.bytes]),
        "scaling": (_scaling, [row for row in rows if row.suite == "scaling"]),
        "throughput": (_throughput, [row for row in of_device if row.suite in MODELS and row.allocator == "default"]),
    }
    paths = []
    for name, (picture, chosen) in pictures.items():
        if chosen:
            figure = Figure(figsize=(9, 6), layout="constrained")
            picture(figure, chosen)
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=120)
            path = folder / f"{name}.png"
            write_atomically(path, data.getvalue())
            paths.append(path)
    return paths


def _case(row: Row) -> str:
    where = f"{row.op} {row.preset}{' + bwd' if 'backward' in row.direction else ''}" if row.op else row.suite
    return f"{where} {row.dtype}"


def _speedups(figure, rows: Sequence[Row]) -> None:
    """Bars: how many times faster than plain, the whiskers from the 20th to the 80th percentile of rounds."""
    names = [f"{_case(row)}: {row.provider}" for row in rows]
    ours = ["tab:blue" if row.provider.startswith("stellar_fast") else "tab:gray" for row in rows]
    figure.set_size_inches(9, 1.5 + 0.18 * len(rows))
    axes = figure.subplots()
    spread = [
        [max(0.0, row.ratio - row.ratio_p20) for row in rows],
        [max(0.0, row.ratio_p80 - row.ratio) for row in rows],
    ]
    axes.barh(range(len(rows)), [row.ratio for row in rows], xerr=spread, color=ours, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times plain's speed", title=_title(rows[0]))


def _roofline(figure, rows: Sequence[Row]) -> None:
    """Operators over their arithmetic intensity, under the copy's bandwidth and the best GEMM rate of their run."""
    axes = figure.subplots()
    intensities = [row.flops / row.bytes for row in rows]
    ends = min(intensities) / 2, max(intensities) * 2
    for dtype in dict.fromkeys(row.dtype for row in rows):
        of_dtype = [row for row in rows if row.dtype == dtype]
        copy, gemm, colour = of_dtype[0].copy_gb_per_s, of_dtype[0].best_gemm_gflop_per_s, COLOURS[dtype]
        x = sorted({*ends, min(max(gemm / copy, ends[0]), ends[1])})
        axes.plot(
            x, [min(copy * i, gemm) for i in x], color=colour, label=f"{dtype}: {gemm:.0f} GFLOP/s, {copy:.0f} GB/s"
        )
        for provider, marker in (("stellar_fast", "o"), ("plain", "x")):
            chosen = [row for row in of_dtype if row.provider.split(".")[0] == provider]
            axes.plot(
                [row.flops / row.bytes for row in chosen],
                [row.gflop_per_s for row in chosen],
                marker,
                color=colour,
                label=f"{provider} {dtype}",
            )
    for name in dict.fromkeys(row.op for row in rows):
        best = max((row for row in rows if row.op == name), key=lambda row: row.gflop_per_s)
        axes.annotate(name, (best.flops / best.bytes, best.gflop_per_s), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s", title=_title(rows[0]))
    axes.legend(fontsize=7)


def _scaling(figure, rows: Sequence[Row]) -> None:
    """One panel a series: time over what grows, with the fitted exponent."""
    fits = scaling.exponents(rows)
    names = list(dict.fromkeys(row.direction for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure.set_size_inches(4 * columns, 3 * lines)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        for dtype in dict.fromkeys(row.dtype for row in rows if row.direction == name):
            of_series = [row for row in rows if (row.direction, row.dtype) == (name, dtype)]
            label = f"{dtype}, exponent {fits[name, dtype]:.2f}" if (name, dtype) in fits else dtype
            x, y = [scaling.grown(row) for row in of_series], [row.median_ms for row in of_series]
            axes.plot(x, y, "o-", label=label, color=COLOURS[dtype])
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms")
        axes.legend(fontsize=7)
    figure.suptitle(_title(rows[0]))


def _throughput(figure, rows: Sequence[Row]) -> None:
    """One panel a suite and batch: images/s of this package and of plain, run by run; the commit stands below."""
    names = sorted({(row.suite, row.batch) for row in rows})
    figure.set_size_inches(4 * min(3, len(names)), 3 * -(-len(names) // 3))
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), min(3, len(names)), i + 1)
        of_suite = sorted((row for row in rows if (row.suite, row.batch) == name), key=lambda row: row.date)
        runs = {row.date: row.commit for row in of_suite}
        places = {date: place for place, date in enumerate(runs)}
        for dtype in dict.fromkeys(row.dtype for row in of_suite):
            for provider, style in (("stellar_fast", "o-"), ("plain", "x:")):
                chosen = [row for row in of_suite if (row.dtype, row.provider) == (dtype, provider)]
                rates = [row.batch / row.median_ms * 1e3 for row in chosen]
                axes.plot(
                    [places[r.date] for r in chosen], rates, style, color=COLOURS[dtype], label=f"{provider} {dtype}"
                )
        axes.set_xticks(range(len(runs)), list(runs.values()), rotation=60, fontsize=6)
        axes.set(ylim=(0, None), ylabel="images/s", title=f"{name[0]} B={name[1]}")
        axes.legend(fontsize=6)
    figure.suptitle(_title(rows[0]))


def _title(row: Row) -> str:
    return f"{row.device_name}, torch {row.torch}, allocator {row.allocator}"
