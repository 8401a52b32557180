"""The search: which candidate of an operator's launch knobs is faster than the heuristic's, beyond doubt.

A candidate is timed in turns with the heuristic's knobs, so that a slow moment of the machine falls on both. What is
clearly slower is dropped after one turn. Those that change the same knobs compete; the winners' knobs are joined, since
candidates differ from the heuristic in knobs whose times do not interact.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any, Protocol

from stellar_fast.tune.bench import Case, Json, RejectedError, Samples, changed
from stellar_fast.tune.store import Entry

SLOWER = 1.4  # a candidate that takes this many times the heuristic's time is dropped after one round
SCREEN_ROUNDS, FINAL_ROUNDS = 3, 15
FINALISTS = 2  # of those that change the same knobs
PROMISING = 0.97  # ratio after the first rounds, of candidates that may be finalists
GAIN = 1.03  # that knobs other than the heuristic's have to bring: less is in reach of chance
SCREEN_SHARE = 0.6  # of the time for one set of knobs; the finals have the rest


class Launcher(Protocol):
    """What measures: `worker.Worker`, or a test."""

    def open(self, op: str, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> list[Case]: ...
    def measure(self, case: int, config: Json, rounds: int, whole: bool = False) -> Samples: ...


@dataclass(frozen=True)
class Request:
    """An operator at a shape of its spec; `state` is what entries depend on beside: threads, software and source."""

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    state: Mapping[str, Any]

    @property
    def text(self) -> str:
        return " ".join([self.dtype, *(f"{letter}={size}" for letter, size in self.shape.items())])

    def is_of(self, entry: Entry) -> bool:
        """Whether an entry is this request's."""
        same = all(getattr(entry, name) == value for name, value in self.state.items())
        return same and (entry.op, entry.request) == (self.op, self.text)


@dataclass(frozen=True)
class Progress:
    """Where a search is: its request, the place among all, candidates tried, and what is known or why nothing is."""

    request: Request
    place: int
    entry: Entry | None = None
    candidates: int = 0
    problem: str = ""


def tune(
    requests: Sequence[Request],
    launcher: Launcher,
    known: Iterable[Entry],
    save: Callable[[list[Entry]], object],
    budget_s: float,
    report: Callable[[Progress], object] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Entry]:
    """Search for each request in turn, with an even share of what is left of the budget.

    Args:
        requests: what to tune.
        launcher: measures candidates.
        known: earlier entries. One that is done is the result; another is gone on with.
        save: called with entries whenever something was measured.
        budget_s: for everything. A measurement that has begun is finished.
        report: called as it goes.
        clock: in seconds.

    Returns:
        An entry for each set of knobs; what did not fit in the budget is there as far as it came.
    """
    end, results, known = clock() + budget_s, [], list(known)
    for place, request in enumerate(requests):
        earlier = [entry for entry in known if request.is_of(entry)]
        if (earlier and all(entry.done for entry in earlier)) or clock() >= end:
            results += earlier
            report(
                Progress(request, place, earlier[0]) if earlier else Progress(request, place, problem="no time left")
            )
            continue
        report(Progress(request, place))
        try:
            cases = launcher.open(request.op, request.shape, request.dtype, request.device, request.state["threads"])
        except ValueError as reason:
            report(Progress(request, place, problem=str(reason)))
            continue
        entries = [_entry(request, case, known) for case in cases]
        save(entries)  # all, so that none is forgotten where this is interrupted
        try:
            for index, (case, entry) in enumerate(zip(cases, entries, strict=True)):
                share = (end - clock()) / (len(requests) - place) / (len(cases) - index)
                search = _Search(launcher, index, case, entry, clock, clock() + share)
                for _ in search.screen():
                    save([search.entry])
                    report(Progress(request, place, search.entry, len(search.others)))
                found = entry if entry.done else search.decide()
                save([found])
                known.append(found)
                results.append(found)
                report(Progress(request, place, found, len(search.others)))
        except ValueError as reason:  # after a crash nothing could be opened again
            report(Progress(request, place, problem=str(reason)))
    return results


def _entry(request: Request, case: Case, known: Sequence[Entry]) -> Entry:
    """The one that is known of this shape, or an empty one. Another request may have led to the same knobs."""
    new = Entry(request.op, case.dtype, case.shape, request=request.text, **request.state)
    return next((entry for entry in reversed(known) if (entry.key, entry.source) == (new.key, new.source)), new)


class _Search:
    """Among the candidates of one set of knobs."""

    def __init__(
        self, launcher: Launcher, index: int, case: Case, entry: Entry, clock: Callable[[], float], end: float
    ) -> None:
        self.launcher, self.index, self.entry, self.clock, self.end = launcher, index, entry, clock, end
        self.start, *self.others = case.candidates
        self.round_s = 0.0

    def screen(self) -> Iterator[None]:
        """Measure what is not known yet, as long as there is time; yields after each."""
        left = [] if self.entry.done else [config for config in self.others if not self._is_known(config)]
        random.Random(0).shuffle(left)  # neighbours are alike: where time runs out, some of all kinds are known
        begin = self.clock()
        for config in left:
            if self.clock() >= begin + SCREEN_SHARE * (self.end - begin):
                return
            samples = self._measure(config, 1)
            if samples and samples.ms[0] < SLOWER * samples.heuristic_ms[0]:
                more = self._measure(config, SCREEN_ROUNDS - 1)
                samples = more and Samples(samples.heuristic_ms + more.heuristic_ms, samples.ms + more.ms)
            if samples:
                known = self.entry.measured | {_text(config): round(_ratio(samples), 4)}
                self.entry = replace(self.entry, measured=known, tried=len(known) + len(self.entry.rejected))
            yield

    def decide(self) -> Entry:
        """The fastest knobs beyond doubt."""
        complete = all(map(self._is_known, self.others))
        winners = self._winners()
        joined: Json = {}
        for config in winners:  # the best first
            names = changed(self.start, config)
            if not names & joined.keys():
                joined |= {name: config[name] for name in names}
        for config in [self.start | joined, *winners[:1]] if winners else []:
            samples = self._measure(config, self._rounds(2), whole=True)
            if samples and _low_ratio(samples) > 1:
                knobs = {name: config[name] for name in sorted(changed(self.start, config))}
                found = replace(_timed(self.entry, samples), knobs=knobs, ratio=round(_ratio(samples), 4))
                break
        else:
            samples = self._measure(self.start, SCREEN_ROUNDS, whole=True)
            times = samples.heuristic_ms + samples.ms if samples else [0.0]
            found = replace(_timed(self.entry, Samples(times, times)), knobs={}, ratio=1.0)
        taken = self.start | found.knobs
        left = (c for c in self.others if any(c[name] != taken[name] for name in changed(self.start, c)))
        found = replace(found, next_ratio=max((found.measured.get(_text(c), 0.0) for c in left), default=0.0))
        return replace(found, measured={}, done=True) if complete else found

    def _winners(self) -> list[Json]:
        """The fastest of those that change the same knobs, where it is faster beyond doubt; the best first."""
        groups: dict[frozenset[str], list[Json]] = {}
        promising = [c for c in self.others if self.entry.measured.get(_text(c), 0) > PROMISING]
        for config in sorted(promising, key=lambda c: -self.entry.measured[_text(c)]):
            groups.setdefault(changed(self.start, config), []).append(config)
        finalists = [config for group in groups.values() for config in group[:FINALISTS]]
        rounds = self._rounds(len(finalists) + 2)
        best: dict[frozenset[str], tuple[float, Json]] = {}
        for config in finalists:
            samples = self._measure(config, rounds)
            if samples and _ratio(samples) >= GAIN and _low_ratio(samples) > 1:
                names = changed(self.start, config)
                best[names] = max(best.get(names, (0.0, {})), (_ratio(samples), config), key=lambda pair: pair[0])
        return [config for _, config in sorted(best.values(), key=lambda pair: -pair[0])]

    def _rounds(self, measurements: int) -> int:
        """That so many measurements may take each, in the time that is left."""
        affordable = (self.end - self.clock()) / max(measurements * self.round_s, 1e-9)
        return int(min(max(affordable, SCREEN_ROUNDS), FINAL_ROUNDS))

    def _measure(self, config: Json, rounds: int, whole: bool = False) -> Samples | None:
        """None where the candidate is no longer one."""
        begin = self.clock()
        try:
            samples = self.launcher.measure(self.index, config, rounds, whole)
        except RejectedError as reason:
            rejected = self.entry.rejected | {_text(config): str(reason)}
            known = {text: ratio for text, ratio in self.entry.measured.items() if text not in rejected}
            self.entry = replace(self.entry, rejected=rejected, measured=known, tried=len(known) + len(rejected))
            return None
        self.round_s = max(self.round_s, (self.clock() - begin) / rounds)
        return samples

    def _is_known(self, config: Json) -> bool:
        return _text(config) in self.entry.measured or _text(config) in self.entry.rejected


def _timed(entry: Entry, samples: Samples) -> Entry:
    times = (round(median(times), 5) for times in (samples.heuristic_ms, samples.ms))
    return replace(entry, heuristic_ms=next(times), best_ms=next(times))


def _text(config: Json) -> str:
    return json.dumps(config, sort_keys=True)


def _ratio(samples: Samples) -> float:
    return median(samples.heuristic_ms) / median(samples.ms)


def _low_ratio(samples: Samples) -> float:
    """The 20th percentile of the rounds' ratios."""
    return quantiles((a / b for a, b in zip(samples.heuristic_ms, samples.ms, strict=True)), n=5, method="inclusive")[0]
