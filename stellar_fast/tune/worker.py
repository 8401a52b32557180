"""A process that measures, so that a candidate which ends or hangs it costs that candidate alone.

The child reads lines of JSON, ["open", op, shape, dtype, device, threads] and ["measure", case, config, rounds, whole],
and answers each with an object.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from stellar_fast.tune.bench import Case, Json, RejectedError, Samples

SLOWEST_S = 120.0  # an answer takes at most: compiling a kernel takes seconds


class EndedError(Exception):
    """The child is gone; the next `open` starts another."""


class Worker:
    """A `Bench` in a child process."""

    def __init__(self, slowest_s: float = SLOWEST_S, command: Sequence[str] = (sys.executable, "-m", __name__)) -> None:
        self._slowest_s, self._command = slowest_s, command
        self._child: subprocess.Popen[str] | None = None
        self._opened: list[Any] = []

    def open(self, op: str, shape: Mapping[str, int], dtype: str, device: str, threads: int) -> list[Case]:
        """Raises ValueError where nothing can be tuned."""
        self._opened = ["open", op, dict(shape), dtype, device, threads]
        try:
            answer = self._ask(self._opened)
        except EndedError as reason:
            raise ValueError(f"{op} does not run with the heuristic's knobs: {reason}") from None
        if "error" in answer:
            raise ValueError(answer["error"])
        return [Case(**case) for case in answer["cases"]]

    def measure(self, case: int, config: Json, rounds: int, whole: bool = False) -> Samples:
        """Raises RejectedError, also where the candidate ends the child; ValueError where no new one can be opened."""
        try:
            if self._child is None:
                opened = self._ask(self._opened)
                if "error" in opened:  # not this candidate's: it is measured another time
                    self.close()
                    raise ValueError(opened["error"])
            answer = self._ask(["measure", case, config, rounds, whole])
        except EndedError as reason:
            raise RejectedError(f"crashed: {reason}") from None
        if "rejected" in answer:
            if answer["restart"]:
                self.close()
            raise RejectedError(answer["rejected"])
        return Samples(**answer)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: list[Any]) -> Json:
        if self._child is None:
            # Ctrl-C is the parent's, knobs that are not forced are the heuristic's
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("STELLAR_FAST_TRACEBACK") == "1" else subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                env={**os.environ, "STELLAR_FAST_TUNE": "off"},
            )
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            if not select.select([child.stdout], [], [], self._slowest_s)[0]:
                self.close()
                raise EndedError(f"no answer within {self._slowest_s:g} s")
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = child.wait()
            self.close()
            raise EndedError(f"the process ended with exit code {code}")
        return json.loads(line)


def _is_broken(device: torch.device) -> bool:
    """Whether an error on a GPU stays with the process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def main() -> None:
    """The child."""
    from stellar_fast import native
    from stellar_fast.tune.bench import Bench

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    native.raise_allocator_thresholds()  # as training does
    bench: Bench | None = None
    for line in sys.stdin:
        kind, *request = json.loads(line)
        answer: Json
        if kind == "open":
            op, shape, dtype, device, threads = request
            torch.set_num_threads(threads)
            bench = None  # frees the last one first
            try:
                bench = Bench(op, shape, getattr(torch, dtype), torch.device(device))
                answer = {"cases": [asdict(case) for case in bench.cases]}
            except Exception as error:
                answer = {"error": str(error) or type(error).__name__}
        else:
            assert bench is not None
            try:
                answer = asdict(bench.measure(*request))
            except RejectedError as reason:
                answer = {"rejected": str(reason), "restart": _is_broken(bench.device)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
