"""One operator at one shape: launch knobs verified against fp64, then timed in turns with the heuristic's."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stellar_fast import backend
from stellar_fast.registry import load
from stellar_fast.tune.lookup import Problem, force, from_json, observe

# A candidate may be this many times further from fp64 than the heuristic's result is, plus some roundings: sums are in
# another order. Of integers this share may differ more often: near ties.
WORSE, ROUNDINGS, INTEGERS = 2.0, 4.0, 1e-3
# Relative errors beyond which the heuristic itself is not believed.
MOST_ERROR = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
SAMPLE_MS, MOST_REPEATS = 1.0, 200  # shorter calls are repeated: clock and launch have noise of their own
PASSES = ("forward", "backward")
TUNED = ("triton", "onednn", "cpu")  # backends with launch knobs

Json = dict[str, Any]


class RejectedError(Exception):
    """A candidate that is wrong, or does not run."""


@dataclass(frozen=True)
class Case:
    """One set of knobs that the operator asks for; its candidates as JSON, the heuristic's first."""

    shape: dict[str, int]
    dtype: str
    candidates: list[Json]


@dataclass(frozen=True)
class Samples:
    """Times of a call in ms, of the heuristic and of a candidate in turns."""

    heuristic_ms: list[float]
    ms: list[float]


def tuned_backend(op: str, device: str) -> str:
    """The backend of an operator whose knobs are tuned on a device; empty where there is none."""
    found = [name for name in backend.OPS[op] if name in TUNED and not backend.refusal(name, device)]
    return found[0] if found and not backend.interpreting() else ""


def changed(one: Json, other: Json) -> frozenset[str]:
    """The knobs in which two configs differ."""
    return frozenset(name for name in one if one[name] != other[name])


def passes_of(config: Json, knobs: frozenset[str]) -> tuple[str, ...]:
    """What has to be timed where these knobs change: those named forward have no influence on the backward."""
    is_forward = {name: name.startswith("forward") for name in config}
    if not any(is_forward.values()) or len({is_forward[name] for name in knobs}) != 1:
        return PASSES
    return ("forward",) if is_forward[next(iter(knobs))] else ("backward",)


class Bench:
    """An operator with its inputs, that runs with the knobs forced on it."""

    def __init__(self, op: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError where the operator has no knobs on this device, or is wrong with the heuristic's."""
        self.spec, self.dtype, self.device = load(op), dtype, device
        self.backend = tuned_backend(op, device.type)
        inputs = self.spec.make_inputs(shape, dtype, device, torch.Generator().manual_seed(0))
        self.gradients = [name for name in self.spec.gradients if isinstance(inputs.get(name), Tensor)]
        self.arguments = self._leaves(inputs)
        self._warm = False
        with backend.use_backend(**{op: self.backend}):
            with observe() as in_forward:
                self._along = [_noise(out) for out in _differentiable(self._forward())]
            self._graph = _differentiable(self._forward()) if self.gradients else []
            with observe() as in_backward:
                if self.gradients:
                    self._backward()
        asked = dict(zip(PASSES, (in_forward, in_backward), strict=True))
        self.problems = sorted({p for problems in asked.values() for p in problems if p.op == op}, key=str)
        if not self.problems:
            raise ValueError(f"{op} asks for no launch knobs on {device.type}")
        self._asked = {p: [name for name, problems in asked.items() if p in problems] for p in self.problems}
        self._exact = self._results(self.spec.reference, self._leaves(tree_map(_double, inputs)))
        with backend.use_backend(**{op: self.backend}):
            self._errors = self._errors_now()
        for name, error in self._errors.items():
            if not error <= MOST_ERROR[dtype]:
                raise ValueError(f"{op} is wrong with the heuristic's knobs: {name} is {error:.2g} off fp64")
        self._verified: set[tuple[Problem, Any]] = set()

    @property
    def cases(self) -> list[Case]:
        found = []
        for problem in self.problems:
            start = asdict(problem.heuristic())
            configs = [start, *map(asdict, problem.candidates())]
            timed = [c for c in configs if c == start or self._passes(problem, c)]
            unique = [c for i, c in enumerate(timed) if c not in timed[:i]]
            found.append(Case(dict(problem.shape), str(problem.dtype).removeprefix("torch."), unique))
        return found

    def measure(self, case: int, config: Json, rounds: int, whole: bool = False) -> Samples:
        """Time a candidate and the heuristic in turns: the passes that differ, or the `whole` call.

        Raises:
            RejectedError: wrong results, or an exception.
        """
        problem = self.problems[case]
        knobs, start = from_json(problem.config.Config, config), problem.heuristic()
        passes = self._asked[problem] if whole else self._passes(problem, config)
        try:
            with backend.use_backend(**{self.spec.name: self.backend}):
                with force(problem, knobs):
                    if (problem, knobs) not in self._verified:
                        self._verify()
                        self._verified.add((problem, knobs))
                    self._sample(passes, 1)
                with force(problem, start):
                    once = self._sample(passes, 1)
                    repeats = max(1, min(MOST_REPEATS, math.ceil(SAMPLE_MS / max(once, 1e-3))))
                samples = Samples([], [])
                turns = (start, samples.heuristic_ms), (knobs, samples.ms)
                for i in range(rounds):
                    for chosen, times in turns if i % 2 == 0 else reversed(turns):
                        with force(problem, chosen):
                            times.append(self._sample(passes, repeats))
        except RejectedError:
            raise
        except Exception as error:  # whatever a launch raises
            raise RejectedError(f"crashed: {type(error).__name__}: {error}") from error
        return samples

    def _passes(self, problem: Problem, config: Json) -> list[str]:
        start = asdict(problem.heuristic())
        return [name for name in self._asked[problem] if name in passes_of(start, changed(start, config))]

    def _verify(self) -> None:
        for name, error in self._errors_now().items():
            allowed = WORSE * self._errors[name] + ROUNDINGS * torch.finfo(self.dtype).eps
            if not self._exact[name].is_floating_point():
                allowed = self._errors[name] + INTEGERS
            if not error <= allowed:  # NaN is wrong
                raise RejectedError(f"wrong: {name} is {error:.2g} off fp64, {allowed:.2g} is allowed")

    def _errors_now(self) -> dict[str, float]:
        """Relative error of each output and gradient, for integers the share that differs."""
        with _poisoned_memory():
            found = self._results(self.spec.function, self.arguments)
        return {name: _error(found[name], exact) for name, exact in self._exact.items()}

    def _results(self, function: Callable[..., Any], arguments: Json) -> dict[str, Tensor]:
        outputs = _tensors(function(**arguments))
        found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if self.gradients:
            leaves = [arguments[name] for name in self.gradients]
            used = [out for out in outputs if out.requires_grad]
            along = [x.to(out.dtype) for x, out in zip(self._along, used, strict=True)]
            grads = torch.autograd.grad(used, leaves, along)
            found |= {f"gradient of {name}": grad for name, grad in zip(self.gradients, grads, strict=True)}
        return found

    def _leaves(self, inputs: Json) -> Json:
        return {
            name: value.detach().requires_grad_(name in self.gradients) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def _forward(self) -> list[Tensor]:
        return _tensors(self.spec.function(**self.arguments))

    def _backward(self) -> None:
        leaves = [self.arguments[name] for name in self.gradients]
        torch.autograd.grad(self._graph, leaves, self._along, retain_graph=True)

    def _sample(self, passes: Sequence[str], repeats: int) -> float:
        """Time of a call in ms."""
        calls = [self._forward if name == "forward" else self._backward for name in passes]
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                for call in calls:
                    call()
            return (time.perf_counter() - start) * 1e3 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            for call in calls:
                call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def _differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [out for out in outputs if out.requires_grad]


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


def _error(found: Tensor, exact: Tensor) -> float:
    if not exact.is_floating_point():
        return (found != exact).double().mean().item() if exact.numel() else 0.0
    scale = exact.norm().item()
    return (found.double() - exact).norm().item() / scale if scale else found.double().norm().item()


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN: else what a candidate leaves out would be there from the last one."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
