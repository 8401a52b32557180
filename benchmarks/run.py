"""Verify, then time: this package against the same mathematics written the plain way.

    python benchmarks/run.py                                    in under 4 minutes: objective, encoding, training step,
                                                                data and every operator
    python benchmarks/run.py --suite step --dtype fp32 --rounds 15
    python benchmarks/run.py --suite ops --op lowrank_product,token_attention --shapes all --provider plain_compiled
    python benchmarks/run.py --suite scaling --dtype fp32       how this package's cost grows, with exponents
    python benchmarks/run.py --suite memory --dtype fp32        peak of the prototype loss at 128 images
    python benchmarks/run.py --suite codes,decode               the frozen VQGAN
    python benchmarks/run.py --device cuda --dtype bf16 --batch 32
    python benchmarks/run.py --suite step --against HEAD~5      exit code 1 when it is slower than that commit (or file)

Prints tables and appends their rows to a CSV file in benchmarks/results/, with the same as JSON and plots beside it
(columns: benchmarks/results.py). A provider whose results are wrong gets no time, and the exit code is then 1.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script: the root holds `benchmarks`

from benchmarks import against, measure, operators, plots, report, results, shapes, timing
from benchmarks.measure import DTYPES
from benchmarks.model import data, encode, memory, objective, scaling, step, vqgan
from benchmarks.model.pair import Case
from benchmarks.report import say
from stellar_fast import backend
from stellar_fast.registry import load

MODEL_SUITES: dict[str, tuple[Callable[..., Case], dict[str, int], float]] = {  # images by device, weight in the budget
    # first: what others free raises glibc's own thresholds for good, and plain's blocks then cost fewer page faults
    "objective": (objective.build_case, {"cpu": objective.BATCH, "cuda": 64}, 0.3),
    "encode": (encode.build_case, {"cpu": shapes.ENCODE_BATCH, "cuda": 128}, 1.0),
    "step": (step.build_case, {"cpu": shapes.STEP_BATCH, "cuda": 32}, 1.0),
    "codes": (vqgan.build_codes_case, {"cpu": vqgan.BATCH, "cuda": 16}, 0.3),
    "decode": (vqgan.build_decode_case, {"cpu": vqgan.BATCH, "cuda": 16}, 0.3),
    "data": (data.build_case, {"cpu": data.BATCH, "cuda": data.BATCH}, 0.05),
}
DEFAULT_SUITES = ("objective", "encode", "step", "data", "ops")
SUITES = (*MODEL_SUITES, "ops", "scaling", "memory")
PROVIDERS = ("plain", "plain_compiled", "stellar_fast", "libraries")
# On a CPU compiling costs more than all timings together; a GPU has no use for fp32 models.
DEFAULT_PROVIDERS = {"cpu": ["stellar_fast", "libraries"], "cuda": ["plain_compiled", "stellar_fast", "libraries"]}
DEFAULT_DTYPES = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
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
    add = parser.add_argument
    add("--suite", type=_choices("suite", SUITES), default=list(DEFAULT_SUITES), help=f"of {', '.join(SUITES)}")
    add("--preset", default="b16", help="sizes of the model (default: b16)")
    add("--dtype", type=_choices("dtype", DTYPES), help="default: fp32,bf16 (operators fp32), on CUDA bf16")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--op",
        type=_choices("operator", [*backend.OPS, "all"]),
        help="operators of the suite ops (default: those with a backend here beside the reference)",
    )
    add(
        "--shapes",
        type=_names,
        help="of the operators: names from their specs, or all (default: each one's first of a real model)",
    )
    add("--batch", type=_positive, help="images (default: by suite and device; memory 128)")
    add("--rounds", type=_positive, help="timed rounds of each case (default: what fits the budget)")
    add("--budget", type=float, default=120.0, help="seconds to aim at without --rounds (default: 120)")
    add("--allocator", choices=("default", "raised"), default="default", help="glibc's thresholds, all providers alike")
    add(
        "--provider",
        type=_choices("provider", PROVIDERS),
        help=f"of {', '.join(PROVIDERS)} (default: all, plain_compiled on CUDA only; plain runs in any case)",
    )
    add("--against", metavar="FILE_OR_COMMIT", help="results, or a commit to build and take turns with; slower exits 1")
    add("--out", type=Path, default=results.FOLDER, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    options.op_dtype = options.dtype or DEFAULT_DTYPES[options.device][:1]
    options.dtype = options.dtype or DEFAULT_DTYPES[options.device]
    options.provider = options.provider or DEFAULT_PROVIDERS[options.device]
    try:
        options.shape = shapes.model_shape(options.preset)
        measure.set_allocator(options.allocator)
        is_file = options.against and Path(options.against).is_file()
        options.earlier = results.read_rows(Path(options.against)) if is_file else None
    except ValueError as error:
        parser.error(str(error))
    for op in options.op or []:
        for name in options.shapes or []:
            if "all" not in (op, name) and name not in load(op).shapes:
                parser.error(f"{op} has no shape {name!r}; named: {', '.join(load(op).shapes)}")
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
    """Everything that is to be measured in this process, in order."""
    device = torch.device(options.device)
    plans = []
    for suite in options.suite:
        if suite in MODEL_SUITES:
            build, batch, weight = MODEL_SUITES[suite]
            for dtype in ["uint8"] if suite == "data" else options.dtype:
                compute = DTYPES.get(dtype, torch.float32)
                arguments = (options.shape, options.batch or batch[options.device], compute, device, options.provider)
                plans.append(Plan(f"{suite} {dtype}", dtype, lambda f=build, a=arguments: [f(*a)], weight))
    ops_weight = sum(planned.weight for planned in plans) * OPS_SHARE / (1 - OPS_SHARE) or 1.0
    of_ops = [case for op in (_operators(options) if "ops" in options.suite else []) for case in _op_cases(options, op)]
    for op, function, shape, dtype in of_ops:
        label = f"{function} {shape} {dtype}"
        arguments = (op, shape, DTYPES.get(dtype, torch.uint8), device, lambda text, at=label: say(f"{at}: {text}"))
        build = functools.partial(operators.build_cases, *arguments, function, options.provider)
        plans.append(Plan(label, dtype, build, ops_weight / len(of_ops)))
    for dtype in options.dtype if "scaling" in options.suite else []:
        for point in scaling.points(options.shape, DTYPES[dtype], device):
            plans.append(Plan(f"scaling {point.series} {point.x} {dtype}", dtype, point.build, point.flops / 1e12))
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
    asked = named[:1] if options.shapes is None else options.shapes
    taken = named if "all" in asked else [name for name in asked if name in spec.shapes]
    dtypes = [dtype for dtype in options.op_dtype if DTYPES[dtype] in spec.dtypes]
    if not any(dtype.is_floating_point for dtype in spec.dtypes):
        dtypes = ["uint8"]
    return [(op, function, shape, dtype) for function in operators.functions(op) for shape in taken for dtype in dtypes]


def measure_all(
    options: argparse.Namespace,
    plans: Sequence[Plan],
    facts: Mapping[str, str | int],
    ceilings: measure.Ceilings,
    start: float,
    rows: list[results.Row],
) -> int:
    """Add the rows of every plan as they come; returns how many providers were wrong and plans failed."""
    wrong = 0
    for i, planned in enumerate(plans):
        now = time.monotonic()
        share = planned.weight / sum(later.weight for later in plans[i:])
        deadline = now + (start + options.budget - now) * share
        label = f"{planned.label}:"
        say(f"[{i + 1}/{len(plans)}, {now - start:.0f} s] {label} building and verifying")
        told = functools.partial(_say_of, label)
        try:
            built = planned.build()
            found, failed = timing.time_cases(built, planned.dtype, facts, ceilings, options.rounds, deadline, told)
        except Exception as error:  # what fails costs its own rows alone
            told(f"FAILED: {type(error).__name__}: {error}")
            found, failed = [], 1
        rows += found
        wrong += failed
    if "memory" in options.suite:
        found, failed = memory.rows(options.preset, options.batch, options.dtype, facts, ceilings, say)
        rows += found
        wrong += failed
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; the exit code is 1 when a provider was wrong, or slower than what it was held against."""
    options = parse(arguments)
    if options.against and options.earlier is None:
        compare = functools.partial(against.with_commit, options.against, options, plan(options), say)
        return against.conclude(compare, say, report.print_table)
    device, start = torch.device(options.device), time.monotonic()
    facts = measure.machine_facts(device, options.allocator)
    ceilings = measure.Ceilings(measure.copy_gb_per_s(device, measure.timer_for(device)))
    plans, rows = plan(options), []
    try:
        wrong = measure_all(options, plans, facts, ceilings, start, rows)
    except KeyboardInterrupt:
        say("interrupted: what was measured is kept")
        wrong = 1
    report.show(rows, facts, ceilings)
    if rows:
        path = results.result_path(options.out, facts)
        beside = results.append_rows(path, rows)
        drawn = plots.draw(rows, results.read_rows(sorted(options.out.glob("*.csv"))), options.out / "plots")
        print(f"{len(rows)} rows -> {path}, {beside}, {', '.join(map(str, drawn)) or 'no plots without matplotlib'}")
    if options.against:
        compare = functools.partial(against.with_file, rows, options.earlier)
        return against.conclude(compare, say, report.print_table) or int(wrong > 0)
    return 1 if wrong or not rows else 0


def _say_of(label: str, text: str, end: str = "\n") -> None:
    say(f"{label} {text}", end)


if __name__ == "__main__":
    sys.exit(main())
