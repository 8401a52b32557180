"""One side of `run.py --against COMMIT`: builds and times cases with the package of its own environment.

`python benchmarks/worker.py` reads one JSON object a line from stdin and answers each with one line on stdout:

    {"options": {...}, "threads": 2}                                run.py's; answers what it measures with
    {"build": "koleo b16 fp32"}                                     frees the last case of run.py's plan, builds and
                                                                    verifies this; answers errors: below 1 is right
    {"time": ["forward B=8", "stellar_fast.cpu"], "repeats": 3}     answers milliseconds of one call
    {"error": "..."}                                                the answer where that was not possible

It runs beside a worker of another package, so it computes only while it is asked.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind the environment's package: the root holds one too

from benchmarks import measure, run, shapes, timing
from benchmarks.measure import Timer
from benchmarks.model.pair import Case
from benchmarks.run import Plan

Message = dict[str, Any]


def start(message: Message) -> tuple[dict[str, Plan], Timer, Message]:
    """The plan of the same options, without the operators that this package does not have."""
    import stellar_fast
    from stellar_fast import backend, native

    options = argparse.Namespace(**message["options"])
    options.shape = shapes.model_shape(options.preset)
    options.op = options.op and [op for op in options.op if op in (*backend.OPS, "all")]
    torch.set_num_threads(message["threads"])
    measure.set_allocator(options.allocator)
    facts = {
        "package": stellar_fast.__file__,
        "native": native.reason(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    plans = {planned.label: planned for planned in run.plan(options)}
    return plans, measure.timer_for(torch.device(options.device)), facts


def build(plans: Mapping[str, Plan], label: str) -> dict[str, Case]:
    """The cases of a plan by direction and sizes: a named shape may have had others. ValueError without such a plan."""
    if label not in plans:
        raise ValueError("has no such operator or shape")
    return {f"{case.direction} {case.shape}": case for case in plans[label].build()}


def error(case: Case, provider: str) -> float:
    """As a share of the tolerance; 0 where nothing is verified, as in a series of sizes."""
    return max((check.error for check in case.checks.get(provider, [])), default=0.0)


def time_ms(case: Case, provider: str, repeats: int, timer: Timer) -> float:
    """Of one call; of a short one the median, after a call that wakes threads from the other worker's turn."""
    call = case.calls[provider]
    with timing.threads(case.threads):
        if repeats > 1:
            call()
        return measure.summarise([timer(call) for _ in range(repeats)]).median


def serve(requests: IO[str], answers: IO[str], plans: Mapping[str, Plan], timer: Timer) -> None:
    """Answer until the requests end."""
    cases: dict[str, Case] = {}
    for line in requests:
        message = json.loads(line)
        try:
            if "build" in message:
                cases.clear()
                gc.collect()
                cases = build(plans, message["build"])
                errors = {name: {p: error(case, p) for p in case.calls} for name, case in cases.items()}
                answer: Message = {"errors": errors}
            else:
                name, provider = message["time"]
                answer = {"ms": time_ms(cases[name], provider, message["repeats"], timer)}
        except Exception as reason:  # whatever a case of another version raises is an answer
            answer = {"error": f"{type(reason).__name__}: {reason}"}
        send(answers, answer)


def send(answers: IO[str], answer: Message) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints, C++ included, must not get between the answers
    plans, timer, facts = start(json.loads(sys.stdin.readline()))
    send(answers, facts)
    serve(sys.stdin, answers, plans, timer)


if __name__ == "__main__":
    main()
