"""Verify, then time: this package against the same mathematics written the plain way.

    python benchmarks/run.py                                    encode, a training step and its objective of b16, then
                                                                the operators
    python benchmarks/run.py --suite step --dtype fp32 --rounds 15
    python benchmarks/run.py --suite ops --op lowrank_product,token_attention --op-shape all
    python benchmarks/run.py --suite scaling --dtype fp32       how this package's cost grows, with exponents
    python benchmarks/run.py --suite memory --dtype fp32        peak of the prototype loss at 128 images
    python benchmarks/run.py --suite codes,decode               the frozen VQGAN
    python benchmarks/run.py --suite objective --providers plain,plain_compiled,stellar_fast
    python benchmarks/run.py --device cuda --dtype bf16 --batch 32
    python benchmarks/run.py --suite step --against HEAD~5      exit code 1 when it is slower than that commit (or file)

Images by default: encode 8, step 2, objective 8, memory 128.

Prints tables and appends their rows to benchmarks/results/ (columns: benchmarks/measure.py). A provider whose results
are wrong gets no time, and the exit code is then 1.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script: the root holds `benchmarks`

from benchmarks import against, measure, operators, shapes
from benchmarks.measure import DTYPES, Row
from benchmarks.model import encode, memory, objective, scaling, step, vqgan
from benchmarks.model.pair import Case
from stellar_fast import backend
from stellar_fast.registry import load

MODEL_SUITES: dict[str, tuple[Callable[..., Case], int, float]] = {  # images, and weight in the budget
    # first: what others free raises glibc's own thresholds for good, and plain's blocks then cost fewer page faults
    "objective": (objective.build_case, objective.BATCH, 0.3),
    "encode": (encode.build_case, shapes.ENCODE_BATCH, 1.0),
    "step": (step.build_case, shapes.STEP_BATCH, 1.0),
    "codes": (vqgan.build_codes_case, vqgan.BATCH, 0.3),
    "decode": (vqgan.build_decode_case, vqgan.BATCH, 0.3),
}
DEFAULT_SUITES = ("objective", "encode", "step", "ops")
SUITES = (*MODEL_SUITES, "ops", "scaling", "memory")
PROVIDERS = ("plain", "plain_compiled", "stellar_fast")
SCALING_ROUNDS = 3
OPS_SHARE = 0.15  # of the budget, where the models run too


@dataclass(frozen=True)
class Plan:
    """Cases before they are built and verified together; `weight` is their share of the time."""

    label: str
    dtype: str
    build: Callable[[], list[Case]]
    weight: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite",
        type=_choices("suite", SUITES),
        default=list(DEFAULT_SUITES),
        help="default: encode,step,objective,ops",
    )
    parser.add_argument("--preset", default="b16", help="sizes of the model (default: b16)")
    parser.add_argument("--dtype", type=_choices("dtype", DTYPES), default=list(DTYPES), help="default: fp32,bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--op",
        type=_choices("operator", [*backend.OPS, "all"]),
        help="operators of the suite ops (default: those with a backend here beside the reference)",
    )
    parser.add_argument(
        "--op-shape", type=_names, help="named shapes of their specs, or all (default: each operator's first real one)"
    )
    parser.add_argument("--batch", type=_positive, help="images (default: encode 8, step 2, objective 8, memory 128)")
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
        default=["plain", "stellar_fast"],
        help=f"of the models, of {', '.join(PROVIDERS)} (default: plain,stellar_fast; plain runs in any case)",
    )
    parser.add_argument(
        "--against", metavar="FILE_OR_COMMIT", help="results, or a commit to build and take turns with; slower exits 1"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    options = parser.parse_args(arguments)
    try:
        options.shape = shapes.model_shape(options.preset)
        measure.set_allocator(options.allocator)
    except ValueError as error:
        parser.error(str(error))
    for op in options.op or []:
        for name in options.op_shape or []:
            if "all" not in (op, name) and name not in load(op).shapes:
                parser.error(f"{op} has no shape {name!r}; named: {', '.join(load(op).shapes)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _choices(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        names = _names(text)
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


def plan(options: argparse.Namespace) -> list[Plan]:
    """Everything that is to be measured, in order."""
    device = torch.device(options.device)
    plans = []
    for suite in options.suite:
        if suite in MODEL_SUITES:
            build, batch, weight = MODEL_SUITES[suite]
            for dtype in options.dtype:
                arguments = (options.shape, options.batch or batch, DTYPES[dtype], device, options.providers)
                plans.append(Plan(f"{suite} {dtype}", dtype, lambda f=build, a=arguments: [f(*a)], weight))
    ops_weight = sum(planned.weight for planned in plans) * OPS_SHARE / (1 - OPS_SHARE) or 1.0
    of_ops = [case for op in (_operators(options) if "ops" in options.suite else []) for case in _op_cases(options, op)]
    for op, function, shape, dtype in of_ops:
        label = f"{function} {shape} {dtype}"
        arguments = (op, shape, DTYPES.get(dtype, torch.uint8), device, lambda text, at=label: say(f"{at}: {text}"))
        build = functools.partial(operators.build_cases, *arguments, function)
        plans.append(Plan(label, dtype, build, ops_weight / len(of_ops)))
    return plans


def _operators(options: argparse.Namespace) -> list[str]:
    known = [op for op in backend.OPS if options.device in load(op).devices]
    if options.op is None:
        return [op for op in known if operators.fast_backends(op, options.device)]
    return known if "all" in options.op else options.op


def _op_cases(options: argparse.Namespace, op: str) -> list[tuple[str, str, str, str]]:
    """(op, function, shape, dtype) of one operator."""
    spec = load(op)
    named = [name for name in spec.shapes if name != "small"]
    asked = named[:1] if options.op_shape is None else options.op_shape
    taken = named if "all" in asked else [name for name in asked if name in spec.shapes]
    dtypes = [dtype for dtype in options.dtype if DTYPES[dtype] in spec.dtypes]
    if not any(dtype.is_floating_point for dtype in spec.dtypes):
        dtypes = ["uint8"]
    return [(op, function, shape, dtype) for function in operators.functions(op) for shape in taken for dtype in dtypes]


def run_plan(
    options: argparse.Namespace,
    planned: Plan,
    facts: dict,
    copy_gb_per_s: float,
    gemm: dict[str, float],
    deadline: float,
) -> tuple[list[Row], int]:
    """Verify and time the cases of a plan: their rows, and how many providers were wrong."""
    say(f"{planned.label}: building and verifying")
    cases = planned.build()
    right, wrong = set(), 0
    for provider in cases[0].calls:
        worst = cases[0].worst(provider)
        verdict = f"{worst.name} at {worst.error:.2g} of its tolerance"
        if worst.error < 1:
            right.add(provider)
            say(f"{planned.label}: {provider} agrees in {len(cases[0].checks[provider])} tensors, worst {verdict}")
        else:
            wrong += 1
            say(f"{planned.label}: {provider} is WRONG and gets no time, worst {verdict}")
    rows: list[Row] = []
    for i, case in enumerate(cases if "plain" in right else []):
        now = time.monotonic()
        end = now + (deadline - now) / (len(cases) - i)
        rows += time_case(options, planned, case, right, facts, copy_gb_per_s, gemm, end)
    return rows, wrong


def time_case(
    options: argparse.Namespace,
    planned: Plan,
    case: Case,
    right: set[str],
    facts: dict,
    copy_gb_per_s: float,
    gemm: dict[str, float],
    deadline: float,
) -> list[Row]:
    """Time the providers that are right, one row each."""
    device, timer = torch.device(options.device), measure.timer_for(torch.device(options.device))
    calls = {provider: call for provider, call in case.calls.items() if provider in right}
    for call in calls.values():  # warm up: allocator, autotuners, optimizer state
        call()
    peaks = {provider: measure.peak_extra_mib(call, device) for provider, call in calls.items()}
    beside = {}
    dtype = DTYPES.get(planned.dtype, torch.float32)
    if not case.op:  # beside a step a large product takes little; an operator takes less time than the product
        beside["gemm"], product_flops = measure.gemm(dtype, device)
        beside["gemm"]()
    elif planned.dtype not in gemm:
        gemm[planned.dtype] = measure.gemm_gflop_per_s(dtype, device, timer)
    samples = measure.interleave(
        calls | beside,
        timer,
        options.rounds,
        deadline - time.monotonic(),
        lambda done, total: say(
            f"{planned.label} {case.direction}: round {done}/{total}", end="\r" if done < total else "\n"
        ),
    )

    if beside:
        gemm[planned.dtype] = product_flops / measure.summarise(samples.pop("gemm")).median / 1e6
    rows = []
    for provider, times in samples.items():
        time_ms, speed = measure.summarise(times), measure.ratio(samples["plain"], times)
        gflop_per_s = case.flops / time_ms.median / 1e6
        rows.append(
            Row(
                **facts,
                suite=case.suite,
                op=case.op,
                direction=case.direction,
                provider=provider,
                preset=case.preset,
                shape=case.shape,
                batch=case.batch,
                dtype=planned.dtype,
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
                gemm_gflop_per_s=gemm[planned.dtype],
                gemm_share=gflop_per_s / gemm[planned.dtype],
                gb_per_s=case.bytes / time_ms.median / 1e6,
                copy_gb_per_s=copy_gb_per_s,
                peak_extra_mib=peaks[provider],
                worst_check=case.worst(provider).error,
            )
        )
    return rows


def run_scaling(options: argparse.Namespace, facts: dict, copy_gb_per_s: float) -> list[Row]:
    """Print each series with its exponent; the rows have no ratio, for plain is not run."""
    device = torch.device(options.device)
    timer, rows = measure.timer_for(device), []
    for dtype in options.dtype:
        gemm = measure.gemm_gflop_per_s(DTYPES[dtype], device, timer)
        rounds = options.rounds or SCALING_ROUNDS
        found = scaling.measure_all(options.shape, DTYPES[dtype], device, rounds, timer, say)
        for series in dict.fromkeys(point.series for point, _ in found):
            lines = [(point, time_ms) for point, time_ms in found if point.series == series]
            grows = scaling.exponent([point.x for point, _ in lines], [time_ms.median for _, time_ms in lines])
            _print_table(
                f"{series}, {dtype}: time grows with exponent {grows:.2f}",
                [
                    {
                        series.split(", ")[1]: str(point.x),
                        "median ms": _ms(time_ms.median),
                        "p20 - p80": f"{_ms(time_ms.p20)} - {_ms(time_ms.p80)}",
                        "ms an image": _ms(time_ms.median / point.batch),
                        "GFLOP/s": f"{point.flops / time_ms.median / 1e6:.0f}",
                    }
                    for point, time_ms in lines
                ],
            )
        for point, time_ms in found:
            gflop_per_s = point.flops / time_ms.median / 1e6
            rows.append(
                Row(
                    **facts,
                    suite="scaling",
                    op="",
                    direction=point.series,
                    provider="stellar_fast",
                    preset=options.shape.preset,
                    shape=point.shape.describe(point.batch, step=not point.series.startswith("encode")),
                    batch=point.batch,
                    dtype=dtype,
                    rounds=rounds,
                    median_ms=time_ms.median,
                    p20_ms=time_ms.p20,
                    p80_ms=time_ms.p80,
                    flops=point.flops,
                    gflop_per_s=gflop_per_s,
                    gemm_gflop_per_s=gemm,
                    gemm_share=gflop_per_s / gemm,
                    copy_gb_per_s=copy_gb_per_s,
                )
            )
    return rows


def run_memory(options: argparse.Namespace, facts: dict, copy_gb_per_s: float) -> tuple[list[Row], int]:
    """Print the peak memory of the prototype loss and what share of plain's it is; the rows have no times.

    Returns the rows, and how many providers were wrong: their loss is not plain's.
    """
    batch = options.batch or memory.BATCH
    R, T = memory.sizes(options.shape, batch)
    shape = f"B={batch} R={R} T={T} E={options.shape.prototype_dim} C={options.shape.num_clusters}"
    rows, lines, wrong = [], [], 0
    for dtype in options.dtype:
        found, losses = {}, {}
        for provider in memory.PROVIDERS:
            say(f"memory {dtype}: {provider}")
            arguments = (provider, options.preset, batch, dtype, options.device)
            found[provider], losses[provider] = memory.extra_mib(*arguments)
            error = memory.disagreement(losses[provider], losses["plain"], dtype)
            if not error < 1:
                wrong += 1
                verdict = f"loss {losses[provider]:.6g} beside plain's {losses['plain']:.6g}"
                say(f"memory {dtype}: {provider} is WRONG and is not reported, {verdict}")
                continue
            share = f"{found[provider] / found['plain']:.1%}"
            line = {"dtype": dtype, "provider": provider, "extra MiB": f"{found[provider]:.0f}", "of plain": share}
            lines.append(line)
            rows.append(
                Row(
                    **facts,
                    suite="memory",
                    op="prototype_cross_entropy",
                    direction="forward+backward",
                    provider=provider,
                    preset=options.shape.preset,
                    shape=shape,
                    batch=batch,
                    dtype=dtype,
                    rounds=1,
                    copy_gb_per_s=copy_gb_per_s,
                    peak_extra_mib=found[provider],
                    worst_check=error,
                )
            )
    if lines:
        _print_table(f"Prototype loss, {shape}: peak beyond inputs and gradients", lines)
    return rows, wrong


def say(text: str, end: str = "\n") -> None:
    """Progress on stderr: stdout holds the table alone."""
    print(text, end=end, file=sys.stderr, flush=True)


def show(rows: Sequence[Row], facts: dict, copy_gb_per_s: float) -> None:
    """One table of the models and one of the operators."""
    title = (
        f"{facts['device_name']}, torch {facts['torch']}, {facts['threads']} threads, allocator {facts['allocator']}, "
        f"copy {copy_gb_per_s:.1f} GB/s, commit {facts['commit']}"
    )
    for of_ops in (False, True):
        chosen = [row for row in rows if bool(row.op) == of_ops]
        if chosen:
            _print_table(title, [_cells(row) for row in chosen])


def _cells(row: Row) -> dict[str, str]:
    """A table's line, by column."""
    direction = "fwd + bwd" if "backward" in row.direction else "fwd"
    what = {"op": row.op, "shape": row.preset, "": direction} if row.op else {"suite": row.suite}
    bytes_rate = {"GB/s": f"{row.gb_per_s:.1f}", "of copy": f"{row.gb_per_s / row.copy_gb_per_s:.0%}"} if row.op else {}
    return {
        **what,
        "dtype": row.dtype,
        "provider": row.provider,
        "median ms": _ms(row.median_ms),
        "p20 - p80 ": f"{_ms(row.p20_ms)} - {_ms(row.p80_ms)}",
        "vs plain": f"{row.ratio:.2f}x",
        "p20 - p80": f"{row.ratio_p20:.2f} - {row.ratio_p80:.2f}",
        **bytes_rate,
        "GFLOP/s": f"{row.gflop_per_s:.0f}",
        "of GEMM": f"{row.gemm_share:.0%} of {row.gemm_gflop_per_s:.0f}",
        "extra MiB": "unknown" if row.peak_extra_mib is None else f"{row.peak_extra_mib:.0f}",
    }


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _print_table(title: str, lines: Sequence[dict[str, str]]) -> None:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; the exit code is 1 when a provider was wrong, or slower than what it was held against."""
    options = parse(arguments)
    if options.against and not Path(options.against).is_file():
        compare = functools.partial(against.with_commit, options.against, options, plan(options), say)
        return against.conclude(compare, say, _print_table)
    device = torch.device(options.device)
    facts = measure.machine_facts(device, options.allocator)
    copy_gb_per_s = measure.copy_gb_per_s(device, measure.timer_for(device))
    plans = plan(options)
    rows: list[Row] = []
    wrong = 0
    gemm: dict[str, float] = {}  # GFLOP/s by dtype
    end = time.monotonic() + options.budget
    for i, planned in enumerate(plans):
        now = time.monotonic()
        share = planned.weight / sum(later.weight for later in plans[i:])
        found, failed = run_plan(options, planned, facts, copy_gb_per_s, gemm, now + (end - now) * share)
        rows, wrong = rows + found, wrong + failed
    show(rows, facts, copy_gb_per_s)
    if "scaling" in options.suite:
        rows += run_scaling(options, facts, copy_gb_per_s)
    if "memory" in options.suite:
        found, failed = run_memory(options, facts, copy_gb_per_s)
        rows, wrong = rows + found, wrong + failed
    slower = 0
    if options.against:  # before the rows are written, perhaps to the same file
        slower = against.conclude(functools.partial(against.with_file, rows, Path(options.against)), say, _print_table)
    if rows:
        path = measure.result_path(options.out, facts)
        measure.append_rows(path, rows)
        print(f"{len(rows)} rows -> {path}")
    return slower or int(bool(wrong or not rows))


if __name__ == "__main__":
    sys.exit(main())
