"""Measuring in another process, which candidates may end."""

import sys

import pytest

from stellar_fast.tune.bench import Case, RejectedError, Samples
from stellar_fast.tune.worker import Worker

# A child whose candidates are called what they do.
CHILD = """
import json, os, signal, sys, time
for line in sys.stdin:
    kind, *request = json.loads(line)
    if kind == "open":
        answer = {"cases": [{"shape": {}, "dtype": "float32", "candidates": [{}]}]}
        if request[0] == "nothing":
            answer = {"error": "no such shape"}
        if request[0] == "dead":
            sys.exit(3)
    else:
        does = request[1]["does"]
        if does == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if does == "hang":
            time.sleep(60)
        answer = {"heuristic_ms": [1.0], "ms": [os.getpid()]}
        if does == "sticky error":
            answer = {"rejected": "crashed: illegal address", "restart": True}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def worker():
    worker = Worker(slowest_s=0.5, command=(sys.executable, "-S", "-c", CHILD))
    yield worker
    worker.close()


def opened(worker: Worker, op: str = "koleo") -> list[Case]:
    return worker.open(op, {}, "float32", "cpu", 1)


def test_what_ends_the_process_costs_one_candidate(worker):
    assert opened(worker) == [Case({}, "float32", [{}])]
    processes = [worker.measure(0, {"does": "work"}, 1)]
    for does, reason in (
        ("segfault", "crashed: the process ended with exit code -11"),
        ("hang", "crashed: no answer within 0.5 s"),
        ("sticky error", "crashed: illegal address"),
    ):
        with pytest.raises(RejectedError, match=reason):
            worker.measure(0, {"does": does}, 1)
        processes.append(worker.measure(0, {"does": "work"}, 1))
    assert len({samples.ms[0] for samples in processes}) == 4, "a new process after each"
    assert all(isinstance(samples, Samples) and samples.heuristic_ms == [1.0] for samples in processes)


def test_what_cannot_be_opened_says_why(worker):
    with pytest.raises(ValueError, match="no such shape"):
        opened(worker, "nothing")
    with pytest.raises(ValueError, match=r"dead does not run with the heuristic's knobs: the process ended .* code 3"):
        opened(worker, "dead")
    assert opened(worker)
