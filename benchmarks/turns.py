"""Two worker processes (benchmarks/worker.py) that take turns, and what their times say beyond the run's own noise."""

import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.environment import tail
from benchmarks.measure import Summary, interleave, ratio

TURN_MS = 20.0  # calls of one turn last at least so long together: a process wakes up slowly
ROUNDS = (8, 100)  # fewest and most that the budget gives
HALVINGS = 400  # drawn to find the noise
NOISE_SHARE = 0.9  # of them stay within what is called the noise: 2.3 standard errors of the ratio
LEAST_NOISE = 0.03  # long calls of one commit against itself were up to 2 % apart on 2 cores
ABSENT = "has it not"

Answer = dict[str, Any]
Say = Callable[..., object]


class Planned(Protocol):
    """What is needed of a plan of run.py."""

    @property
    def label(self) -> str: ...
    @property
    def weight(self) -> float: ...


class Worker:
    """A process of benchmarks/worker.py, or what speaks like it; `name` is for messages."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        self._said = tempfile.NamedTemporaryFile(prefix="stellar_fast_worker_")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},  # comes before a package
        )

    def ask(self, **message: Any) -> Answer:
        """Send a message and wait for its answer. Raises RuntimeError with its last words where it has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(message, default=str), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"the worker of {self.name} died with exit code {code}:\n{tail(Path(self._said.name))}")
        return json.loads(answer)

    def call_ms(self, case: str, provider: str, repeats: int) -> float:
        """Milliseconds of one call. Raises RuntimeError where it fails."""
        answer = self.ask(time=[case, provider], repeats=repeats)
        if "error" in answer:
            raise RuntimeError(f"{provider} of {self.name} fails when it is timed: {answer['error']}")
        return answer["ms"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


@dataclass(frozen=True)
class Point:
    """What one provider of a case took on both sides."""

    label: str
    case: str
    provider: str
    old_ms: list[float]
    new_ms: list[float]

    @property
    def name(self) -> str:
        return f"{self.label} {self.case} {self.provider}"

    @property
    def ratio(self) -> Summary:
        """The old side's time over the new one's."""
        return ratio(self.old_ms, self.new_ms)

    @property
    def noise(self) -> float:
        return noise(self.old_ms, self.new_ms)

    @property
    def verdict(self) -> str:
        return verdict(self.ratio.median < 1 / (1 + self.noise), self.ratio.median > 1 + self.noise)


def verdict(slower: bool, faster: bool) -> str:
    return "SLOWER" if slower else "faster" if faster else "same"


def noise(old_ms: Sequence[float], new_ms: Sequence[float]) -> float:
    """How far from 1 the ratio of the sides in half of the rounds is over that in the other half, but for the odd draw.

    Slow minutes are in it as much as they move the ratio, which is less than they move the times.
    """
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(len(old_ms)), (HALVINGS, 1)), axis=1)
    halves = np.array_split(order, 2, axis=1)
    of_half = [
        np.log(np.median(np.asarray(old_ms)[half], axis=1) / np.median(np.asarray(new_ms)[half], axis=1))
        for half in halves
    ]
    return max(LEAST_NOISE, float(np.expm1(np.quantile(np.abs(of_half[0] - of_half[1]), NOISE_SHARE))))


@dataclass(frozen=True)
class Found:
    """What both sides took, what is left out and why, and what is wrong on the new side."""

    points: list[Point]
    left_out: list[str]
    wrong: list[str]


def take_turns(
    old: Worker, new: Worker, plans: Sequence[Planned], rounds: int | None, budget_s: float, say: Say
) -> Found:
    """Build and verify every case on both sides, and time what is right on both."""
    found = Found([], [], [])
    end = time.monotonic() + budget_s
    for i, planned in enumerate(plans):
        label, now = planned.label, time.monotonic()
        deadline = now + (end - now) * planned.weight / sum(later.weight for later in plans[i:])
        say(f"{label}: building and verifying on both sides")
        built = [worker.ask(build=label) for worker in (old, new)]
        shared = []
        for case, provider in _ours(built):
            faults = [_fault(answer, case, provider) for answer in built]
            name = " ".join(filter(None, (label, case, provider)))
            reasons = [f"{w.name}: {fault}" for w, fault in zip((old, new), faults, strict=True) if fault]
            if not reasons:
                shared.append((case, provider))
                continue
            found.left_out.append(f"{name}: {'; '.join(reasons)}")
            if faults[1] not in ("", ABSENT):
                found.wrong.append(f"{name}: {faults[1]}")
        for j, pair in enumerate(shared):
            share_s = (deadline - time.monotonic()) / (len(shared) - j)
            found.points.append(_time(old, new, Point(label, *pair, [], []), rounds, share_s, say))
    return found


def _ours(built: Sequence[Answer]) -> list[tuple[str, str]]:
    """(case, provider) of this package that either side has; one without a name where a side was not built."""
    if any("error" in answer for answer in built):
        return [("", "")]
    found = [(case, name) for answer in built for case, errors in answer["errors"].items() for name in errors]
    return [pair for pair in dict.fromkeys(found) if pair[1].startswith("stellar_fast")]


def _fault(built: Answer, case: str, provider: str) -> str:
    """Why a provider of one side gets no time; empty where it does."""
    if "error" in built or not provider:
        return built.get("error", "")
    error = built["errors"].get(case, {}).get(provider)
    if error is None:
        return ABSENT
    return "" if error < 1 else f"is WRONG, at {error:.2g} of its tolerance"


def _time(old: Worker, new: Worker, point: Point, rounds: int | None, budget_s: float, say: Say) -> Point:
    of, end = (point.case, point.provider), time.monotonic() + budget_s
    for side in (old, new):
        side.call_ms(*of, repeats=1)  # the first call: allocators, autotuners, optimizer state
    warm_ms = [side.call_ms(*of, repeats=1) for side in (old, new)]
    repeats = max(1, math.ceil(TURN_MS / min(warm_ms)))
    round_s = sum(warm_ms) / 1e3 * (repeats + (repeats > 1))
    fitting = min(ROUNDS[1], max(ROUNDS[0], int((end - time.monotonic()) / round_s)))

    def progress(done: int, total: int) -> None:
        say(f"{point.name}: round {done}/{total}", end="\r" if done < total else "\n")

    # one point at a time: of several, a side would come after itself more often in some than in others
    calls = {name: partial(side.call_ms, *of, repeats) for name, side in (("old", old), ("new", new))}
    samples = interleave(calls, lambda call_ms: call_ms(), rounds or fitting, 0.0, progress)
    return replace(point, old_ms=samples["old"], new_ms=samples["new"])
