"""Measuring: interleaved timing, memory, and the ceilings of the machine.

Providers are timed in one process in alternating order, so that a slow minute of a shared machine falls on all.
What is quoted is a ratio of medians with the 20th and 80th percentile of the ratios of single rounds; an absolute time
of a shared machine means little.
"""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

Call = Callable[[], object]
Timer = Callable[[Call], float]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Summary:
    """Median and spread of some samples."""

    median: float
    p20: float
    p80: float


def summarise(samples: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile. Raises ValueError without samples."""
    if len(samples) == 0:
        raise ValueError("cannot summarise 0 samples")
    p20, median, p80 = np.percentile(np.asarray(samples, dtype=np.float64), [20, 50, 80])
    return Summary(float(median), float(p20), float(p80))


def ratio(base_ms: Sequence[float], other_ms: Sequence[float]) -> Summary:
    """How many times faster `other` is than `base`: ratio of medians, percentiles of single rounds' ratios."""
    if len(base_ms) != len(other_ms):
        raise ValueError(f"rounds differ: {len(base_ms)} of the base, {len(other_ms)} of the other")
    spread = summarise(np.asarray(base_ms) / np.asarray(other_ms))
    return Summary(summarise(base_ms).median / summarise(other_ms).median, spread.p20, spread.p80)


def wall_ms(call: Call) -> float:
    """Wall time of a call on the CPU, in ms."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def cuda_ms(call: Call) -> float:
    """Time between two events around a call on the current CUDA stream, in ms."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def timer_for(device: torch.device) -> Timer:
    return cuda_ms if device.type == "cuda" else wall_ms


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    rounds: int | None,
    budget_s: float,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Times in ms of each call, all calls once a round, the order turned around every round.

    The calls must be warm. `rounds=None` takes as many rounds as fit in `budget_s` (and in 0.3 s, which cheap calls may
    always have), but between 3 and 200.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    total = rounds or 3
    done = 0
    while done < total:
        for name in names if done % 2 == 0 else reversed(names):
            samples[name].append(timer(calls[name]))
        done += 1
        if rounds is None:
            round_s = sum(map(sum, samples.values())) / 1e3 / done
            total = min(200, max(3, int(max(budget_s, 0.3) / max(round_s, 1e-6))))
        progress(done, max(done, total))
    return samples


def peak_extra_mib(call: Call, device: torch.device) -> float:
    """Memory in MiB that one call needs at its peak beyond what is held before it.

    CUDA: torch's allocator. Linux on the CPU: resident memory of the process, after glibc has handed its free blocks
    back and operators what they keep between calls, so that this and memory which torch does not see (oneDNN, native
    code) count too. NaN where the system cannot tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        from stellar_fast.ops.scratch import release_scratch

        release_scratch()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        before_kib = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - before_kib) / 1024
    except (OSError, AttributeError):
        call()
        return float("nan")


def _status_kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1))


def gemms(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Call], float]:
    """A large product by each library that is here, torch's default path first, and its FLOPs."""
    rows, inner, outer = (8192, 8192, 8192) if device.type == "cuda" else (2048, 2048, 2048)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    products: dict[str, Call] = {"torch": lambda: F.linear(x, weight)}
    has_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if has_onednn and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return products, 2.0 * rows * inner * outer


@dataclass
class Ceilings:
    """What this machine reaches in this run: a large copy, and large products in GFLOP/s by dtype and library."""

    copy_gb_per_s: float
    gemm_gflop_per_s: dict[str, dict[str, float]] = field(default_factory=dict)

    def floor_ms(self, flops: float, bytes: float, dtype: str) -> float:
        """No call that needs these can be faster."""
        products_ms = flops / max(self.gemm_gflop_per_s[dtype].values()) / 1e6 if flops else 0.0
        return max(products_ms, bytes / self.copy_gb_per_s / 1e6)


def gemm_gflop_per_s(dtype: torch.dtype, device: torch.device, timer: Timer, rounds: int = 7) -> dict[str, float]:
    """The rate of those products by library, of the fastest round: what shares are taken of is a ceiling."""
    calls, flops = gemms(dtype, device)
    for call in calls.values():
        call()
    return {name: flops / min(times) / 1e6 for name, times in interleave(calls, timer, rounds, 0).items()}


def copy_gb_per_s(device: torch.device, timer: Timer, rounds: int = 7) -> float:
    """Bandwidth of copying a tensor larger than the caches, bytes read and written, in GB/s."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best_ms = summarise([timer(lambda: target.copy_(source)) for _ in range(rounds)]).median
    return 2 * source.numel() * source.element_size() / best_ms / 1e6


def set_allocator(setting: str) -> None:
    """Choose how the C library's allocator treats large blocks, for this process.

    "default" changes nothing: glibc maps blocks over 32 MiB afresh each time, and every use pays for page faults.
    "raised" keeps them for reuse. It holds for every provider alike and is named on every row.

    Raises:
        ValueError: an unknown setting, or "raised" where it cannot take effect.
    """
    if setting == "raised":
        from stellar_fast import native

        took_effect, why_not = native.raise_allocator_thresholds()
        if not took_effect:
            raise ValueError(f"allocator 'raised' does not take effect here: {why_not}")
    elif setting != "default":
        raise ValueError(f"allocator must be 'default' or 'raised' but is {setting!r}")


def machine_facts(device: torch.device, allocator: str) -> dict[str, str | int]:
    """The columns of a row that describe the machine and the software."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "absent"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "config": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("STELLAR_FAST_")),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def cpu_name() -> str:
    """The processor's name and number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text("utf-8", "replace"), re.MULTILINE)
        name = found.group(1).strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def git_commit() -> str:
    """Short hash of the checked-out commit, with "-dirty" for uncommitted changes; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # the result files themselves do not make a tree dirty
        changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
