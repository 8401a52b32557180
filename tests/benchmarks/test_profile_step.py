"""The profile of a step: busy and idle time from spans, and a small step on the CPU."""

import json

import pytest

from benchmarks.model import profile_step
from benchmarks.model.profile_step import Gap, Span


def test_gaps_and_busy_time_of_two_overlapping_streams() -> None:
    spans = [
        Span(0, 100, "gemm"),
        Span(50, 120, "copy"),  # of another stream
        Span(60, 90, "copy"),
        Span(150, 200, "gemm"),
        Span(210, 300, "softmax"),
    ]
    found = profile_step.summarise_spans(reversed(spans), steps=2, step_ms=0.2)
    assert found.busy_ms == pytest.approx((120 + 50 + 90) / 2 / 1e3)
    assert found.profiled_ms == pytest.approx(300 / 2 / 1e3)
    assert found.idle_share_profiled == pytest.approx(40 / 300)
    assert found.idle_share == pytest.approx(1 - 0.13 / 0.2)
    assert found.gaps == [Gap(30, "copy", "gemm"), Gap(10, "gemm", "softmax")]
    assert [(k.name, k.runs, k.ms) for k in found.kernels] == [
        ("gemm", 1.0, pytest.approx(0.075)),
        ("copy", 1.0, pytest.approx(0.05)),
        ("softmax", 0.5, pytest.approx(0.045)),
    ]
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1)
    with pytest.raises(ValueError, match="0 kernels"):
        profile_step.summarise_spans([], 1, 1.0)


def test_a_small_step_on_the_cpu(tmp_path) -> None:
    profile_step.main(["--preset", "tiny", "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert 0 < found["busy_ms"] <= found["profiled_ms"]
    assert 0 <= found["idle_share"] < 1 and 0 <= found["idle_share_profiled"] < 1
    assert {"stellar_fast::linear", "stellar_fast::sinkhorn"} <= {kernel["name"] for kernel in found["kernels"]}
    assert "stellar_fast::linear" in (tmp_path / "profile.txt").read_text()
