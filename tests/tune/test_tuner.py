"""The search, with a fake clock and fake kernels."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from stellar_fast.tune.bench import Case, RejectedError, Samples, passes_of
from stellar_fast.tune.store import Entry
from stellar_fast.tune.tuner import Progress, Request, tune

STATE = {"threads": 2, "software": "torch 2", "source": "abc"}
SHAPE = {"R": 8, "D": 4}
START = {"forward": 4, "backward": 4}


def request(op: str = "koleo") -> Request:
    return Request(op, SHAPE, "float32", "cpu", STATE)


class Machine:
    """Time passes as kernels run. `ms` says how long by config, or why not; every fifth round is an outlier."""

    def __init__(self, ms: Mapping[str, float | BaseException], candidates: list[dict[str, Any]] | None = None) -> None:
        self.now, self.ms, self.calls, self.opened = 0.0, dict(ms), [], []
        self.candidates = [START, *({**START, "forward": n} for n in (1, 2, 8, 16))] + (candidates or [])
        self.rounds = 0

    def clock(self) -> float:
        return self.now

    def open(self, op: str, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> list[Case]:
        self.opened.append(op)
        if op == "broken":
            raise ValueError("it is broken")
        return [Case(dict(shape), dtype, self.candidates)]

    def measure(self, case: int, config: dict[str, Any], rounds: int, whole: bool = False) -> Samples:
        self.calls.append((config, rounds))
        found = Samples([], [])
        for _ in range(rounds):
            self.rounds += 1
            for times, one in ((found.heuristic_ms, START), (found.ms, config)):
                ms = self.time(one) * (7 if self.rounds % 5 == 0 else 1)
                times.append(ms)
                self.now += ms / 1e3
        return found

    def time(self, config: dict[str, Any]) -> float:
        total = 0.0
        for name, value in config.items():
            ms = self.ms.get(f"{name}={value}", 10.0)
            if isinstance(ms, BaseException):
                raise ms
            total += ms
        return total

    def tune(self, *requests: Request, known: list[Entry] = (), budget_s: float = 1e3, **options: Any) -> list[Entry]:  # type: ignore[assignment]
        self.saved: dict[str, Entry] = {}

        def save(entries: list[Entry]) -> None:
            self.saved |= {entry.key: entry for entry in entries}

        return tune(requests or [request()], self, known, save, budget_s, clock=self.clock, **options)

    def measured(self) -> set[str]:
        return {json.dumps(config) for config, _ in self.calls if config != START}


def test_the_fastest_is_found_in_spite_of_outliers():
    machine = Machine({"forward=1": 40, "forward=2": 9, "forward=8": 6, "forward=16": 8})
    (entry,) = machine.tune()
    assert entry.knobs == {"forward": 8} and entry.done and entry.tried == 4 and not entry.rejected
    assert entry.next_ratio == pytest.approx(20 / 18, abs=1e-4), "16, in its first rounds"
    assert entry.ratio == pytest.approx(20 / 16) and (entry.heuristic_ms, entry.best_ms) == (20, 16)
    assert machine.saved == {entry.key: entry}
    assert [rounds for config, rounds in machine.calls if config["forward"] == 1] == [1], "clearly slower: one look"


def test_winners_that_change_different_knobs_are_joined():
    others = [{**START, "backward": n} for n in (2, 8)]
    machine = Machine({"forward=2": 7, "backward=8": 5, "backward=2": 6}, others)
    (entry,) = machine.tune()
    assert entry.knobs == {"forward": 2, "backward": 8} and entry.ratio == pytest.approx(20 / 12, abs=1e-4)


def test_the_heuristic_stays_where_nothing_beats_it_beyond_doubt():
    (entry,) = Machine({"forward=8": 9.9}).tune()
    assert entry.knobs == {} and entry.ratio == 1 and entry.done and entry.best_ms == entry.heuristic_ms == 20


def test_candidates_that_are_wrong_or_crash_are_out():
    failures = {"forward=2": RejectedError("wrong: off"), "forward=8": RejectedError("crashed: exit code -11")}
    (entry,) = Machine({"forward=1": 9, "forward=16": 7} | failures).tune()
    assert entry.knobs == {"forward": 16} and entry.done and entry.tried == 4
    assert sorted(entry.rejected.values()) == ["crashed: exit code -11", "wrong: off"]


def test_the_budget_is_kept_and_shared():
    many = [{**START, "forward": n} for n in range(17, 60)]
    machine = Machine({}, many)
    ops = [request("koleo"), request("sinkhorn"), request("linear")]
    entries = machine.tune(*ops, budget_s=9.0)
    assert machine.now < 9.0 + 1.0, "but for what has begun"
    assert [entry.op for entry in entries] == ["koleo", "sinkhorn", "linear"]
    assert all(3 < entry.tried < 12 and not entry.done for entry in entries)
    assert all(len(entry.measured) == entry.tried for entry in entries)


def test_it_goes_on_where_it_ended():
    many = [{**START, "forward": n} for n in range(17, 60)]
    first = Machine({"forward=40": 5}, many)
    (half,) = first.tune(budget_s=2.0)
    assert not half.done
    second = Machine({"forward=40": 5}, many)
    (entry,) = second.tune(known=[half])
    assert entry.done and entry.knobs == {"forward": 40} and entry.tried == 47 and entry.measured == {}
    screened_again = {c for c in second.measured() if json.dumps(json.loads(c), sort_keys=True) in half.measured}
    assert len(screened_again) <= 2, "only finalists"
    third = Machine({})
    assert third.tune(known=[entry]) == [entry] and not third.opened, "done is done"


def test_an_interrupt_keeps_what_was_measured():
    machine = Machine({"forward=2": KeyboardInterrupt()})
    machine.candidates = [START, *({**START, "forward": n} for n in (16, 8, 2))]
    with pytest.raises(KeyboardInterrupt):
        machine.tune()
    (entry,) = machine.saved.values()
    assert not entry.done and len(entry.measured) == len({c for c in machine.measured() if '"forward": 2' not in c})


def test_an_operator_that_cannot_be_tuned_is_told_and_left_out():
    told: list[Progress] = []
    machine = Machine({})
    (entry,) = machine.tune(request("broken"), request(), report=told.append)
    assert entry.op == "koleo" and [p.problem for p in told if p.problem] == ["it is broken"]


def test_two_requests_for_the_same_knobs_are_one_search():
    machine = Machine({"forward=8": 5})
    other = Request("koleo", {**SHAPE, "stats": 1}, "float32", "cpu", STATE)
    machine.open = lambda *_: [Case(SHAPE, "float32", machine.candidates)]  # type: ignore[method-assign]
    first, second = machine.tune(request(), other)
    assert first == second and len(machine.saved) == 1


def test_entries_of_other_sources_are_not_gone_on_with():
    machine = Machine({"forward=8": 5})
    (entry,) = machine.tune()
    changed = Request("koleo", SHAPE, "float32", "cpu", STATE | {"source": "def"})
    (again,) = Machine({}).tune(changed, known=[entry])
    assert again.knobs == {} and again.source == "def" and again.key == entry.key, "and takes its place"


@pytest.mark.parametrize(
    ("knobs", "passes"),
    [
        ({"forward"}, ("forward",)),
        ({"forward", "forward_splits"}, ("forward",)),
        ({"backward"}, ("backward",)),
        ({"forward", "backward"}, ("forward", "backward")),
    ],
)
def test_only_what_knobs_have_an_influence_on_is_timed(knobs, passes):
    assert passes_of({"forward": 1, "forward_splits": 2, "backward": 3}, frozenset(knobs)) == passes
    assert passes_of({"columns": 1, "slices": 2}, frozenset({"columns"})) == ("forward", "backward")
