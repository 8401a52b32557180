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
        with pytest.raises(ValueError, match=r"'triton' was asked for, .*koleo can use: reference"):
            ops.koleo(torch.rand(1, 2, 3))
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


def test_what_cannot_work_raises() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'crop'"), use_backend(crop="cpu"):
        pass
    with use_backend("triton"), pytest.raises(ValueError, match=r"'triton' was asked for.*can use: cpu, reference"):
        pick("crop_resize")
