"""A case becomes rows: what is wrong gets no time, the rest takes turns, beside the ceilings of the machine."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import DTYPES, Ceilings
from benchmarks.model.pair import Case
from benchmarks.results import NOTHING, Row

Say = Callable[..., object]


def verify(case: Case, say: Say) -> tuple[set[str], int]:
    """The providers that are right, and how many are not."""
    right = set()
    for provider in case.calls:
        checks = case.checks.get(provider)
        if checks is None:  # verified elsewhere
            right.add(provider)
            continue
        worst = case.worst(provider)
        verdict = f"{worst.name} at {worst.error:.2g} of its tolerance"
        if worst.error < 1:
            right.add(provider)
            say(f"{provider} agrees in {len(checks)} tensors, worst {verdict}")
        else:
            say(f"{provider} is WRONG and gets no time, worst {verdict}")
    return right, len(case.calls) - len(right)


def time_cases(
    cases: Sequence[Case],
    dtype: str,
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    rounds: int | None,
    deadline: float,
    say: Say,
) -> tuple[list[Row], int]:
    """Verify the cases of one plan together, and time them until `deadline` (of time.monotonic).

    Returns their rows, and how many providers were wrong. Where plain is wrong itself nothing is timed.
    """
    right, wrong = verify(cases[0], say)
    rows: list[Row] = []
    for i, case in enumerate(cases if "plain" in right or "plain" not in cases[0].calls else []):
        now = time.monotonic()
        end = now + (deadline - now) / (len(cases) - i)
        with threads(case.threads):
            samples, peaks = _samples(case, right, dtype, torch.device(facts["device"]), ceilings, rounds, end, say)
            rows += [
                _row(case, provider, samples, peaks, dtype, {**facts, "threads": torch.get_num_threads()}, ceilings)
                for provider in samples
            ]
    return rows, wrong


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's number of threads in the block; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _samples(
    case: Case,
    right: set[str],
    dtype: str,
    device: torch.device,
    ceilings: Ceilings,
    rounds: int | None,
    deadline: float,
    say: Say,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(Times in ms, peaks in MiB) by provider; sets the ceiling of the dtype."""
    timer, compute = measure.timer_for(device), DTYPES.get(dtype, torch.float32)
    calls = {provider: call for provider, call in case.calls.items() if provider in right}
    for call in calls.values():  # warm up: allocator, autotuners, optimizer state
        call()
    peaks = {provider: measure.peak_extra_mib(call, device) for provider, call in calls.items()}
    if case.flops and (not case.op or dtype not in ceilings.gemm_gflop_per_s):  # products take longer than operators
        ceilings.gemm_gflop_per_s[dtype] = measure.gemm_gflop_per_s(compute, device, timer)

    def progress(done: int, total: int) -> None:
        say(f"{case.direction}: round {done}/{total}", end="\r" if done < total else "\n")

    return measure.interleave(calls, timer, rounds, deadline - time.monotonic(), progress), peaks


def _row(
    case: Case,
    provider: str,
    samples: Mapping[str, Sequence[float]],
    peaks: Mapping[str, float],
    dtype: str,
    facts: Mapping[str, Any],
    ceilings: Ceilings,
) -> Row:
    time_ms = measure.summarise(samples[provider])
    speed = measure.Summary(NOTHING, NOTHING, NOTHING)
    if "plain" in samples:
        speed = measure.ratio(samples["plain"], samples[provider])
    rate = case.flops / time_ms.median / 1e6
    gemm = ceilings.gemm_gflop_per_s[dtype] if case.flops else {"torch": NOTHING}
    return Row(
        **facts,
        suite=case.suite,
        op=case.op,
        direction=case.direction,
        provider=provider,
        preset=case.preset,
        shape=case.shape,
        batch=case.batch,
        dtype=dtype,
        rounds=len(samples[provider]),
        median_ms=time_ms.median,
        p20_ms=time_ms.p20,
        p80_ms=time_ms.p80,
        ratio=speed.median,
        ratio_p20=speed.p20,
        ratio_p80=speed.p80,
        images_per_s=NOTHING if case.op else case.batch / time_ms.median * 1e3,
        flops=case.flops,
        bytes=case.bytes,
        gflop_per_s=rate,
        gemm_gflop_per_s=gemm["torch"],
        gemm_share=rate / gemm["torch"],
        best_gemm_gflop_per_s=max(gemm.values()),
        mfu=rate / max(gemm.values()),
        gb_per_s=case.bytes / time_ms.median / 1e6,
        copy_gb_per_s=ceilings.copy_gb_per_s,
        floor_share=ceilings.floor_ms(case.flops, case.bytes, dtype) / time_ms.median,
        peak_extra_mib=peaks[provider],
        worst_check=case.worst(provider).error if provider in case.checks else NOTHING,
    )
