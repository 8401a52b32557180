"""The operators' cases of run.py as pytest-benchmark sees them, for its files and its comparisons.

    pytest benchmarks/ --op koleo,sinkhorn --dtype fp32,bf16
    pytest benchmarks/ --benchmark-autosave
    pytest benchmarks/ --benchmark-compare --benchmark-compare-fail=median:10%

Providers follow each other here: against an earlier run of a shared machine this finds large changes alone. For
ratios, run.py takes turns.
"""

import functools
import importlib

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import operators
from benchmarks.measure import DTYPES, Call
from benchmarks.model.pair import Case
from stellar_fast import backend
from stellar_fast.registry import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    asked = [op for op in (option("op") or "").split(",") if op]
    here = [op for op in backend.OPS if DEVICE.type in load(op).devices and operators.fast_backends(op, DEVICE.type)]
    unknown = [text for text, known in ((op, backend.OPS) for op in asked) if text not in known]
    unknown += [dtype for dtype in option("dtype").split(",") if dtype not in DTYPES]
    if unknown:
        raise pytest.UsageError(f"unknown {unknown[0]!r}: operators are {', '.join(backend.OPS)}; dtypes fp32, bf16")
    cases = []
    for op in asked or here:
        for function in operators.functions(op):
            cases += [(op, function, *rest) for rest in _variants(op, option("shapes"), option("dtype").split(","))]
    metafunc.parametrize(("op", "function", "shape", "dtype", "direction", "provider"), cases, ids=_name(cases))


def _variants(op: str, shape: str | None, dtypes: list[str]) -> list[tuple[str, str, str, str]]:
    """(shape, dtype, direction, provider) of an operator."""
    spec = load(op)
    shape = shape or next(name for name in spec.shapes if name != "small")
    if shape not in spec.shapes:
        return []
    taken = [name for name in dtypes if DTYPES[name] in spec.dtypes]
    if not any(dtype.is_floating_point for dtype in spec.dtypes):
        taken = ["uint8"]
    libraries = importlib.import_module(f"benchmarks.ops.{op}").PROVIDERS
    ours = operators.fast_backends(op, DEVICE.type) or ["reference"]
    return [
        (shape, dtype, direction, provider)
        for dtype in taken
        for direction in ["forward", *(["forward+backward"] if spec.gradients else [])]
        for provider in [*libraries, *(f"stellar_fast.{name}" for name in ours)]
    ]


def _name(cases: list[tuple[str, ...]]) -> list[str]:
    return ["-".join(case[1:]) for case in cases]


@functools.lru_cache(maxsize=1)
def _cases(op: str, function: str, shape: str, dtype: str) -> dict[str, Case]:
    built = operators.build_cases(op, shape, DTYPES.get(dtype, torch.uint8), DEVICE, lambda text: None, function)
    return {case.direction: case for case in built}


# few rounds: many operators at real sizes have to fit into two minutes
@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=1)
def test_op(
    op: str, function: str, shape: str, dtype: str, direction: str, provider: str, benchmark: BenchmarkFixture
) -> None:
    case = _cases(op, function, shape, dtype)[direction]
    if provider not in case.calls:
        pytest.skip(f"{provider} does not take this device, shape or dtype")
    worst = case.worst(provider)
    assert worst.error < 1, f"{provider} is wrong: {worst.name} at {worst.error:.2g} of its tolerance"
    benchmark.group = f"{function} {shape} {dtype} {direction}"
    benchmark(_complete(case.calls[provider]))
    seconds = benchmark.stats.stats.median
    rates = {"gb_per_s": case.bytes / seconds / 1e9, "gflop_per_s": case.flops / seconds / 1e9}
    benchmark.extra_info |= {"shape": case.shape, "flops": case.flops, "bytes": case.bytes} | rates


def _complete(call: Call) -> Call:
    """The call with its kernels: pytest-benchmark's clock is the host's."""
    if DEVICE.type == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
