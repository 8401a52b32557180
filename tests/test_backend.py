"""Choosing a backend: a request works or raises."""

import pytest
import torch

from stellar_fast import backend, ops
from stellar_fast.backend import pick, use_backend


def test_every_operator_has_a_reference() -> None:
    for op, written in backend.OPS.items():
        assert "reference" in written and set(written) <= set(backend.BACKENDS), op


def test_describe_has_one_row_each_and_one_in_use() -> None:
    rows = backend.describe()
    assert len(rows) == len(backend.OPS) * len(backend.BACKENDS)
    for op in backend.OPS:
        in_use = [row.backend for row in rows if row.op == op and row.reason == "in use"]
        assert in_use == [pick(op)]
    assert all(row.reason for row in rows)


def test_requests_nest_and_end() -> None:
    assert pick("crop_resize") == "cpu"
    with use_backend("reference"):
        assert pick("crop_resize") == "reference"
        with use_backend(crop_resize="cpu"):
            assert pick("crop_resize") == "cpu"
        assert pick("crop_resize") == "reference"
        with use_backend("cpu"):
            assert pick("crop_resize") == "cpu"
    assert pick("crop_resize") == "cpu"


def test_every_operator_honours_a_request_and_info_never_fails() -> None:
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"'triton' was asked for, .*nearest_code can use: cpu, reference"):
            ops.nearest_code(torch.rand(2, 3), torch.rand(4, 3))
        assert any("was asked for" in row.reason for row in backend.describe())


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("reference", "crop_resize=reference", "cpu, crop_resize=reference"):
        monkeypatch.setenv("STELLAR_FAST_BACKEND", text)
        assert pick("crop_resize") == "reference"
        with use_backend("cpu"):
            assert pick("crop_resize") == "cpu"
    monkeypatch.setenv("STELLAR_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="unknown backend 'fastest'; backends: reference, torch, onednn, cpu"):
        pick("crop_resize")


def test_a_backend_runs_on_its_devices_alone() -> None:
    assert pick("linear", "cpu") == "onednn"
    assert pick("linear", "cuda") == "torch"
    assert pick("crop_resize", "cuda") == "reference"
    assert backend.refusal("onednn", "cuda") == "it does not run on cuda tensors"
    with use_backend("onednn"), pytest.raises(ValueError, match=r"'onednn' was asked for, but it does not run on cuda"):
        pick("linear", "cuda")


def test_what_does_not_fit_a_call_is_passed_over_or_raises() -> None:
    unfit = (("onednn", "it takes float32 but x is float64"),)
    assert pick("linear", "cpu", unfit) == "torch"
    assert pick("linear", "cpu", (*unfit, ("torch", "no"))) == "reference"
    with use_backend(linear="onednn"):
        message = "'onednn' was asked for, but it takes float32 but x is float64; linear can use: torch, reference"
        with pytest.raises(ValueError, match=message):
            pick("linear", "cpu", unfit)
        assert pick("linear", "cpu", (("torch", "no"),)) == "onednn"


def test_triton_runs_on_the_cpu_when_asked_for_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.OPS, "koleo", ("triton", "cpu", "reference"))
    monkeypatch.setattr(backend, "why_not", lambda name: "")
    with use_backend(koleo="triton"), pytest.raises(ValueError, match="does not run on cpu tensors"):
        pick("koleo", "cpu")
    assert pick("koleo", "cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pick("koleo", "cpu") == "cpu", "never by itself"
    with use_backend(koleo="triton"):
        assert pick("koleo", "cpu") == "triton"


def test_optional_packages_say_why_they_do_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"{name} was built for another torch")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend.importlib, "import_module", broken)
    backend.why_not.cache_clear()
    try:
        assert backend.why_not("xformers") == "xformers does not import (xformers was built for another torch)"
    finally:
        backend.why_not.cache_clear()


def test_observed_is_what_ran_in_the_block() -> None:
    arguments = (torch.zeros(8, 8, 3, dtype=torch.uint8), [(0, 0, 8, 8)], [False], 4)
    with backend.observe() as outer:
        with backend.observe() as inner:
            ops.crop_resize(*arguments)
        assert inner == {("crop_resize", "cpu")} and outer == set()
        with use_backend("reference"):
            ops.crop_resize(*arguments)
        assert outer == set(), "references are not observed"
        backend.ran("koleo", "triton")
    ops.crop_resize(*arguments)
    assert outer == {("koleo", "triton")} and inner == {("crop_resize", "cpu")}


def test_what_cannot_work_raises() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'crop'"), use_backend(crop="cpu"):
        pass
    with use_backend("triton"), pytest.raises(ValueError, match=r"'triton' was asked for.*can use: cpu, reference"):
        pick("crop_resize")
