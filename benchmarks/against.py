"""Compare this version's speed with that of a result file or of a commit (`run.py --against`).

A file's milliseconds are of another hour, perhaps of a machine that was busy then, so what is compared is each
provider's ratio to plain, which was taken in turns. A slowdown is one where the two spreads do not touch.

A commit's package is built into an environment of its own (benchmarks/environment.py). Two worker processes build and
verify the present tree's cases with a package each; then they take turns, call by call, the order turned around every
round. The run tells its own noise: the ratio of the sides in one half of the rounds against that in the other half
would be 1 without. A difference beyond it is believed when fresh processes show it too, for a process can be slow for
its whole life by where its memory happens to lie.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import environment, resolve, tail
from benchmarks.measure import Summary, summarise
from benchmarks.results import Row
from benchmarks.turns import Answer, Found, Planned, Point, Say, Worker, take_turns, verdict

# what makes two rows the same measurement
KEY = ("suite", "op", "direction", "provider", "shape", "batch", "dtype", "device_name", "threads", "allocator")
WORKER = Path(__file__).with_name("worker.py")
PROCESSES = 3  # pairs of them that have to show a difference
LEAST_ROUNDS = 4  # of which halves say something


@dataclass(frozen=True)
class Report:
    """A table to print, what is left out of it and why, and what got slower or is wrong."""

    title: str
    lines: list[dict[str, str]]
    left_out: list[str]
    failed: list[str]


def with_file(rows: Sequence[Row], earlier: Sequence[Row]) -> Report:
    """Hold measured rows against those of a result file; where one measurement is there more than once, the last.

    Raises:
        ValueError: the file has no row of any of these measurements.
    """
    found = {_key(row): row for row in earlier}
    table, left_out, slower = [], [], []
    for row in rows:
        if math.isnan(row.median_ms) or row.provider == "plain":
            continue
        name = " ".join(filter(None, (row.op or row.suite, row.preset, row.dtype, row.direction, row.provider)))
        then = found.get(_key(row))
        if then is None:
            left_out.append(f"{name}: {_nearest(row, earlier)}")
            continue
        line = {"": name, "ms then": _ms(then.median_ms), "ms now": _ms(row.median_ms)}
        said = "no ratio to plain"
        if not math.isnan(then.ratio + row.ratio):
            said = verdict(row.ratio_p80 < then.ratio_p20, row.ratio_p20 > then.ratio_p80)
        table.append(line | {"vs plain then": _to_plain(then), "vs plain now": _to_plain(row), "verdict": said})
        if said == "SLOWER":
            slower.append(name)
    if not table:
        raise ValueError("the file has none of these measurements; " + (left_out or ["nothing was measured"])[0])
    title = "Against results of another run: ratios to plain; milliseconds of another hour say little"
    return Report(title, table, left_out, slower)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(getattr(row, column)) for column in KEY)


def _nearest(row: Row, earlier: Sequence[Row]) -> str:
    """Why no row is of the same measurement: where the nearest one differs."""
    wanted = _key(row)
    differ = [[i for i, value in enumerate(_key(then)) if value != wanted[i]] for then in earlier]
    if not differ:
        return "the file is empty"
    i = min(range(len(earlier)), key=lambda i: len(differ[i]))
    then = _key(earlier[i])
    return "the nearest has " + ", ".join(f"{KEY[k]} {then[k]!r} instead of {wanted[k]!r}" for k in differ[i])


def _to_plain(row: Row) -> str:
    return _spread(Summary(row.ratio, row.ratio_p20, row.ratio_p80))


def with_commit(commit: str, options: argparse.Namespace, plans: Sequence[Planned], say: Say) -> Report:
    """Time the plans with the package of a commit and with the present one, taking turns.

    Raises:
        ValueError: no such commit, it does not build, or too few rounds to know their noise.
        RuntimeError: a worker died.
    """
    if options.rounds is not None and options.rounds < LEAST_ROUNDS:
        raise ValueError(f"noise is measured from at least {LEAST_ROUNDS} rounds but --rounds is {options.rounds}")
    sha = resolve(commit)
    say(f"{sha[:12]}: environment")
    python = environment(sha, options.device)
    settings = {name: value for name, value in vars(options).items() if name != "shape"}

    def measure(chosen: Sequence[Planned], budget_s: float) -> Found:
        with contextlib.ExitStack() as stack:
            sides = [(sha[:12], python), ("now", sys.executable)]
            old, new = (stack.enter_context(Worker(name, [path, WORKER])) for name, path in sides)
            _check(*(side.ask(options=settings, threads=torch.get_num_threads()) for side in (old, new)), python)
            return take_turns(old, new, chosen, options.rounds, budget_s, say)

    found = measure(plans, options.budget)
    pairs = {point.name: [point] for point in found.points}
    for _ in range(PROCESSES - 1):
        differ = {points[0].label for points in pairs.values() if _common_verdict(points) != "same"}
        if not differ:
            break
        say(f"not the same: {', '.join(sorted(differ))}; again in fresh processes")
        for point in measure([planned for planned in plans if planned.label in differ], options.budget / 2).points:
            pairs[point.name].append(point)
    slower = [name for name, points in pairs.items() if _common_verdict(points) == "SLOWER"]
    title = f"Against {sha[:12]}, {torch.get_num_threads()} threads, allocator {options.allocator}"
    return Report(title, [_line(points) for points in pairs.values()], found.left_out, found.wrong + slower)


def _check(old: Answer, new: Answer, python: Path) -> None:
    """Raises ValueError where the sides do not differ in their packages alone."""
    folder = python.parents[1]
    if not Path(old["package"]).is_relative_to(folder):
        raise ValueError(f"{python} takes the package of {old['package']}: remove {folder} and run again")
    if old["native"] and not new["native"]:
        log = folder / "build.log"
        raise ValueError(f"the commit's C++ does not build ({old['native']}):\n{tail(log)}\nall of it: {log}")
    for name in ("torch", "threads"):
        if old[name] != new[name]:
            raise ValueError(f"the sides differ in {name}: {old[name]} and {new[name]}")


def conclude(
    compare: Callable[[], Report], say: Say, print_table: Callable[[str, list[dict[str, str]]], object]
) -> int:
    """Print a comparison; the exit code is 1 when something got slower, 2 when there was nothing to compare."""
    try:
        report = compare()
    except (ValueError, RuntimeError) as error:
        say(f"error: --against: {error}")
        return 2
    for text in report.left_out:
        say(f"left out: {text}")
    if report.lines:
        print_table(report.title, report.lines)
    for text in report.failed:
        print(f"SLOWER OR WRONG: {text}")
    if not report.lines and not report.failed:
        say("error: --against: nothing to compare is left")
        return 2
    return 1 if report.failed else 0


def _common_verdict(pairs: Sequence[Point]) -> str:
    """Of one point in several pairs of processes: "same" unless they agree."""
    verdicts = {point.verdict for point in pairs}
    return verdicts.pop() if len(verdicts) == 1 else "same"


def _line(pairs: Sequence[Point]) -> dict[str, str]:
    """Shows the pair that saw the least difference, by its own noise."""
    point = min(pairs, key=lambda point: abs(math.log(point.ratio.median)) / point.noise)
    return {
        "": f"{point.label} {point.case}",
        "provider": point.provider,
        "processes x rounds": f"{len(pairs)} x {len(point.old_ms)}",
        "ms then": _ms(summarise(point.old_ms).median),
        "ms now": _ms(summarise(point.new_ms).median),
        "then / now (p20 - p80)": _spread(point.ratio),
        "noise": f"{point.noise:.1%}",
        "verdict": _common_verdict(pairs),
    }


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _spread(speed: Summary) -> str:
    return f"{speed.median:.2f} ({speed.p20:.2f} - {speed.p80:.2f})"
