"""Where the time of a training step goes: by kernel, and between kernels.

    python -m benchmarks.model.profile_step --batch 128 --dtype bf16 --out on_gpu_out

Kernels take under the profiler what they take without, but launches take longer, so gaps look longer than they are.
Hence two shares of idle time: what the profile shows between its kernels, and what is left of an unprofiled step after
the kernels' own time. Steps follow each other without synchronisation, as in training. On a CPU the "kernels" are
torch's operators and gaps are Python's.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.measure import DTYPES
from benchmarks.model import pair, step
from benchmarks.shapes import STEP_BATCH, model_shape
from stellar_fast.files import write_atomically

STEPS = 3


class Span(NamedTuple):
    """A kernel's run, in microseconds."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel, per step."""

    name: str
    runs: float
    ms: float
    share: float


@dataclass(frozen=True)
class Gap:
    """A time without any kernel, between two of them."""

    us: float
    after: str
    before: str


@dataclass(frozen=True)
class Profile:
    """Of some steps in a row; times are per step."""

    step_ms: float  # without the profiler
    profiled_ms: float  # from the first kernel's start to the last one's end
    busy_ms: float  # at least one kernel runs
    idle_share: float  # of the unprofiled step
    idle_share_profiled: float
    kernels: list[Kernel]
    gaps: list[Gap]  # the longest first


def summarise_spans(spans: Iterable[Span], steps: int, step_ms: float) -> Profile:
    """Raises ValueError without spans."""
    spans = sorted(spans)
    if not spans:
        raise ValueError("the profiler saw 0 kernels")
    by_name: dict[str, list[float]] = {}
    gaps, busy_us, last = [], 0.0, spans[0]._replace(end=spans[0].start)
    for span in spans:
        by_name.setdefault(span.name, []).append(span.end - span.start)
        if span.start > last.end:
            gaps.append(Gap(span.start - last.end, last.name, span.name))
        if span.end > last.end:  # streams overlap
            busy_us += span.end - max(span.start, last.end)
            last = span
    whole_us = last.end - spans[0].start
    in_kernels_us = sum(map(sum, by_name.values()))
    kernels = [Kernel(n, len(us) / steps, sum(us) / steps / 1e3, sum(us) / in_kernels_us) for n, us in by_name.items()]
    busy_ms = busy_us / steps / 1e3
    return Profile(
        step_ms=step_ms,
        profiled_ms=whole_us / steps / 1e3,
        busy_ms=busy_ms,
        idle_share=max(0.0, 1 - busy_ms / step_ms),
        idle_share_profiled=1 - busy_us / whole_us,
        kernels=sorted(kernels, key=lambda kernel: -kernel.ms),
        gaps=sorted(gaps, key=lambda gap: -gap.us),
    )


def profile_step(preset: str, batch: int, dtype: torch.dtype, device: torch.device) -> Profile:
    """Of this package's training step, warm."""
    shape = model_shape(preset)
    model = pair.build_stellar_fast(shape, pair.build_plain(shape, device)).train()
    call = step.training_step(model, step.step_forward(shape, batch, device), dtype)

    def steps() -> None:
        for _ in range(STEPS):
            call()

    steps()
    timer = measure.timer_for(device)
    step_ms = measure.summarise([timer(steps) for _ in range(3)]).median / STEPS
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        steps()
        if on_gpu:
            torch.cuda.synchronize()
    of_device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in found.events() or []
        if event.device_type == of_device and event.cpu_parent is None and event.time_range.elapsed_us() > 0
        # on a GPU a named range of the host is an event too, which spans the gaps of its kernels
        if not (on_gpu and event.is_user_annotation)
    ]
    return summarise_spans(spans, STEPS, step_ms)


def describe(found: Profile, kernels: int = 40, gaps: int = 10) -> str:
    """The profile in words."""
    lines = [
        f"step {found.step_ms:.2f} ms; kernels run in {found.busy_ms:.2f} of them: idle {found.idle_share:.1%}",
        f"under the profiler {found.profiled_ms:.2f} ms a step, idle {found.idle_share_profiled:.1%}, "
        f"{len(found.gaps)} gaps in {STEPS} steps, {sum(kernel.runs for kernel in found.kernels):.0f} launches a step",
        "",
        "   ms/step   share    runs  kernel",
        *(f"{k.ms:10.3f}  {k.share:6.1%} {k.runs:7.1f}  {k.name[:100]}" for k in found.kernels[:kernels]),
        "",
        "        us  longest gaps",
        *(f"{gap.us:10.1f}  after {gap.after[:50]}, before {gap.before[:50]}" for gap in found.gaps[:gaps]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the profile and leave it in profile.txt and profile.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="b16")
    parser.add_argument("--batch", type=int, default=STEP_BATCH)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args(arguments)
    found = profile_step(options.preset, options.batch, DTYPES[options.dtype], torch.device(options.device))
    write_atomically(options.out / "profile.txt", describe(found).encode())
    write_atomically(options.out / "profile.json", json.dumps(asdict(found), indent=1).encode())
    print(describe(found), end="")


if __name__ == "__main__":
    main()
