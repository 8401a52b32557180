"""Verify, then time: this package against the same mathematics written the plain way.

    python benchmarks/run.py                                    encode and one training step of b16, fp32 and bf16
    python benchmarks/run.py --suite step --dtype fp32 --rounds 15
    python benchmarks/run.py --device cuda --dtype bf16 --batch 32

Prints a table and appends its rows to benchmarks/results/ (columns: benchmarks/measure.py). A provider whose results
are wrong gets no time, and the exit code is then 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script: the root holds `benchmarks`

from benchmarks import measure, shapes
from benchmarks.measure import DTYPES, Row
from benchmarks.model import encode, step
from benchmarks.model.pair import Case

SUITES: dict[str, tuple[Callable[..., Case], int]] = {
    "encode": (encode.build_case, shapes.ENCODE_BATCH),
    "step": (step.build_case, shapes.STEP_BATCH),
}
PROVIDERS = ("plain", "stellar_fast")

COLUMNS = (
    "suite",
    "dtype",
    "provider",
    "median ms",
    "p20 - p80",
    "vs plain",
    "p20 - p80",
    "GFLOP/s",
    "of GEMM",
    "extra MiB",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=_choices("suite", SUITES), default=list(SUITES), help="default: encode,step")
    parser.add_argument("--preset", default="b16", help="sizes of the model (default: b16)")
    parser.add_argument("--dtype", type=_choices("dtype", DTYPES), default=list(DTYPES), help="default: fp32,bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=_positive, help="images (default: encode 8, step 2)")
    parser.add_argument("--rounds", type=_positive, help="timed rounds of each case (default: what fits the budget)")
    parser.add_argument(
        "--budget", type=float, default=210.0, help="seconds for everything without --rounds (default: 210)"
    )
    parser.add_argument(
        "--allocator", choices=("default", "raised"), default="default", help="glibc's thresholds, both sides"
    )
    parser.add_argument(
        "--providers",
        type=_choices("provider", PROVIDERS),
        default=list(PROVIDERS),
        help="default: all; plain runs in any case",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    options = parser.parse_args(arguments)
    try:
        options.shape = shapes.model_shape(options.preset)
        measure.set_allocator(options.allocator)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    return options


def _choices(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
        return names

    return parse_list


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 but is {value}")
    return value


def run_case(
    options: argparse.Namespace, suite: str, dtype: str, facts: dict, copy_gb_per_s: float, deadline: float
) -> list[Row]:
    """Verify and time one suite in one dtype; no row for a provider that is wrong."""
    device, timer = torch.device(options.device), measure.timer_for(torch.device(options.device))
    build, default_batch = SUITES[suite]
    say(f"{suite} {dtype}: building and verifying")
    case = build(options.shape, options.batch or default_batch, DTYPES[dtype], device, options.providers)
    calls = {}
    for provider, call in case.calls.items():
        worst = case.worst(provider)
        verdict = f"{worst.name} at {worst.error:.2g} of its tolerance"
        if worst.error < 1:
            calls[provider] = call
            say(f"{suite} {dtype}: {provider} agrees in {len(case.checks[provider])} tensors, worst {verdict}")
        else:
            say(f"{suite} {dtype}: {provider} is WRONG and gets no time, worst {verdict}")
    if "plain" not in calls:
        return []

    for call in calls.values():  # warm up: allocator, autotuners, optimizer state
        call()
    peaks = {provider: measure.peak_extra_mib(call, device) for provider, call in calls.items()}
    product, product_flops = measure.gemm(DTYPES[dtype], device)
    product()
    samples = measure.interleave(
        calls | {"gemm": product},
        timer,
        options.rounds,
        deadline - time.monotonic(),
        lambda done, total: say(f"{suite} {dtype}: round {done}/{total}", end="\r" if done < total else "\n"),
    )

    gemm_gflop_per_s = product_flops / measure.summarise(samples.pop("gemm")).median / 1e6
    rows = []
    for provider, times in samples.items():
        time_ms, speed = measure.summarise(times), measure.ratio(samples["plain"], times)
        gflop_per_s = case.flops / time_ms.median / 1e6
        rows.append(
            Row(
                **facts,
                suite=suite,
                provider=provider,
                preset=options.shape.preset,
                shape=case.shape,
                batch=case.batch,
                dtype=dtype,
                rounds=len(times),
                median_ms=time_ms.median,
                p20_ms=time_ms.p20,
                p80_ms=time_ms.p80,
                ratio=speed.median,
                ratio_p20=speed.p20,
                ratio_p80=speed.p80,
                flops=case.flops,
                bytes=case.bytes,
                gflop_per_s=gflop_per_s,
                gemm_gflop_per_s=gemm_gflop_per_s,
                gemm_share=gflop_per_s / gemm_gflop_per_s,
                gb_per_s=case.bytes / time_ms.median / 1e6,
                copy_gb_per_s=copy_gb_per_s,
                peak_extra_mib=peaks[provider],
                worst_check=case.worst(provider).error,
            )
        )
    return rows


def say(text: str, end: str = "\n") -> None:
    """Progress on stderr: stdout holds the table alone."""
    print(text, end=end, file=sys.stderr, flush=True)


def show(rows: Sequence[Row], facts: dict, copy_gb_per_s: float) -> None:
    """The table, by rich where it is installed."""
    title = (
        f"{facts['device_name']}, torch {facts['torch']}, {facts['threads']} threads, allocator {facts['allocator']}, "
        f"copy {copy_gb_per_s:.1f} GB/s, commit {facts['commit']}"
    )
    lines = [
        (
            r.suite,
            r.dtype,
            r.provider,
            f"{r.median_ms:.1f}",
            f"{r.p20_ms:.1f} - {r.p80_ms:.1f}",
            f"{r.ratio:.2f}x",
            f"{r.ratio_p20:.2f} - {r.ratio_p80:.2f}",
            f"{r.gflop_per_s:.0f}",
            f"{r.gemm_share:.0%} of {r.gemm_gflop_per_s:.0f}",
            "unknown" if r.peak_extra_mib is None else f"{r.peak_extra_mib:.0f}",
        )
        for r in rows
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
        for line in (COLUMNS, *lines):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*COLUMNS, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; the exit code is 1 when a provider was wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    facts = measure.machine_facts(device, options.allocator)
    copy_gb_per_s = measure.copy_gb_per_s(device, measure.timer_for(device))
    cases = [(suite, dtype) for suite in options.suite for dtype in options.dtype]
    rows: list[Row] = []
    end = time.monotonic() + options.budget
    for i, (suite, dtype) in enumerate(cases):
        now = time.monotonic()
        rows += run_case(options, suite, dtype, facts, copy_gb_per_s, now + (end - now) / (len(cases) - i))
    show(rows, facts, copy_gb_per_s)
    if rows:
        path = measure.result_path(options.out, facts)
        measure.append_rows(path, rows)
        print(f"{len(rows)} rows -> {path}")
    expected = len(cases) * len({"plain", *options.providers})
    return 0 if len(rows) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
