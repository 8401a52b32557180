"""`stellar-fast tune` from end to end, on shapes that take no time."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stellar_fast import native, ops
from stellar_fast.cli import app
from stellar_fast.commands import console
from stellar_fast.registry import load
from stellar_fast.tune import lookup, tuner
from stellar_fast.tune.store import Entry, ForeignFileError, Store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lookup.forget()
    yield tmp_path / "cache" / "stellar_fast" / "tune"
    lookup.forget()


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "200"})


def test_tune_list_show_clear(cache, monkeypatch):
    small = "--shapes", "small", "--dtype", "fp32", "--device", "cpu", "--budget", "600s"
    result = invoke("linear", "koleo", *small)
    assert result.exit_code == 0, result.output
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    assert content["device"] == lookup.device_name(CPU)
    found = {entry["op"]: entry for entry in content["entries"]}
    assert set(found) == {"koleo", "linear"} and all(entry["done"] for entry in found.values())
    assert found["linear"]["tried"] == 6 and not found["linear"]["rejected"]
    assert found["linear"]["shape"] == {"T": 70, "I": 130, "O": 190} and found["linear"]["threads"] == 1
    assert re.search(r"linear .* float32 R=70 I=130 O=190", result.output) and str(file) in result.output

    monkeypatch.setattr(tuner, "_Search", None)  # nothing is searched again
    assert "linear" in invoke("linear", *small).output
    device = lookup.device_name(CPU)
    assert invoke("list").output.splitlines() == [str(file), f"  {device}, 2 entries: koleo, linear"]
    shown = invoke("show", "linear", "--device", "cpu").output
    assert "float32 R=70" in shown and "koleo" not in shown
    assert "1 entries removed" in invoke("clear", "koleo", "--device", "cpu").output
    assert [entry["op"] for entry in json.loads(file.read_text())["entries"]] == ["linear"]
    assert "1 entries removed" in invoke("clear", "--device", "cpu").output


def test_any_name_of_a_device_serves(cache, monkeypatch):
    """80 letters, not all of them ASCII, some that a terminal library takes for markup; on any terminal."""
    name = "Процессор Größe [bold]龍芯 :x: 3A6000 " + "é" * 44
    assert len(name) == 80
    monkeypatch.setattr(lookup, "device_name", lambda device: name)
    run = invoke("koleo", "--shapes", "small", "--dtype", "fp32", "--device", "cpu", "--budget", 600)
    assert run.exit_code == 0, run.output
    (file,) = cache.iterdir()
    assert f"kept in {file}" in run.output.splitlines() and file.name.isascii()
    for columns in ("40", "200"):

        def output(*arguments: str, columns: str = columns) -> str:
            return CliRunner().invoke(app, arguments, env={"COLUMNS": columns}).output

        assert output("tune", "list").splitlines() == [str(file), f"  {name}, 1 entries: koleo"]
        shown = output("tune", "show", "--device", "cpu")
        assert str(file) in shown.splitlines() and "[bold]" in shown and ":x:" in shown
        knobs = output("info").partition("Launch knobs")[2].partition("Operators")[0]
        cells = [line.split("│")[1:3] for line in knobs.splitlines() if line.startswith("│")]
        assert "".join(cell.strip() for cell, _ in cells).replace(" ", "") == name.replace(" ", "")
        assert "".join(cell.strip() for _, cell in cells).replace(" ", "") == "1of1"
    assert invoke("clear", "--device", "cpu").output == f"1 entries removed from {file}\n"
    assert not lookup.user_store(name).read()


def test_nothing_to_list(cache):
    assert invoke("list").output == f"no tuned launch knobs in {cache}\n"


def test_what_was_tuned_is_what_runs(cache, monkeypatch):
    shape = load("linear").shapes["small"]
    assert invoke("linear", "--shapes", "small", "--dtype", "fp32", "--device", "cpu", "--budget", 600).exit_code == 0
    store = lookup.user_store(lookup.device_name(CPU))
    ((name, entry),) = store.read().items()
    text = json.loads(store.path.read_text())
    text["entries"][0]["knobs"] = {"grad_weight": {"way": "inner_product", "slice_rows": 0}}
    store.path.write_text(json.dumps(text))
    monkeypatch.setenv("STELLAR_FAST_TUNE", "cache")
    lookup.forget()
    ways = []
    door = __import__("sys").modules["stellar_fast.ops.linear"]
    works = door._grad_weight_of_slice
    monkeypatch.setattr(door, "_grad_weight_of_slice", lambda way, *a: ways.append(way) or works(way, *a))
    inputs = load("linear").make_inputs(shape, torch.float32, CPU, torch.Generator().manual_seed(0))
    inputs["weight"].requires_grad_()
    ops.linear(**inputs).sum().backward()
    assert ways == ["inner_product"] and name == entry.key
    compiled = torch.compile(lambda x, weight, bias: ops.linear(x, weight, bias), fullgraph=True)
    compiled(**inputs).sum().backward()
    assert ways == ["inner_product"] * 2


def test_commit_writes_into_a_checkout_alone(cache, monkeypatch, tmp_path):
    room = lookup.room
    elsewhere = tmp_path / "site-packages" / "stellar_fast" / "kernels"
    monkeypatch.setattr(lookup, "room", lambda op: elsewhere / op)
    arguments = "koleo", "--shapes", "small", "--dtype", "fp32", "--device", "cpu", "--budget", 600, "--commit"
    result = invoke(*arguments)
    assert result.exit_code == 2 and f"installed in {elsewhere}" in result.output.replace("\n", "")
    assert not cache.exists(), "before anything is measured"
    elsewhere.mkdir(parents=True)
    (elsewhere.parent / "pyproject.toml").touch()
    lookup.source_hash.cache_clear()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    (file,) = (elsewhere / "koleo" / "configs").iterdir()
    assert [entry["op"] for entry in json.loads(file.read_text())["entries"]] == ["koleo"]
    lookup.source_hash.cache_clear()
    assert room("koleo") != elsewhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sink"], "unknown operator 'sink'; these have: "),
        (["crop_resize"], "crop_resize has no launch knobs on cpu"),
        (["--shapes", "b17"], "no shape is called 'b17'"),
        (["--preset", "c16"], "unknown preset 'c16'"),
        (["--dtype", "int8"], "dtype must be fp32, bf16, fp16 but is 'int8'"),
        (["--budget", "0"], "budget must be a positive number of seconds but is '0'"),
        (["--batch", "-1"], "batch must be at least 1 but is -1"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = invoke(*arguments, *([] if "--device" in arguments else ["--device", "cpu"]))
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


def test_the_native_module_knows_what_it_was_built_from():
    hashes = {op: native.source_hash(op) for op in ("koleo", "linear")}
    assert all(re.fullmatch("[0-9a-f]{16}", found) for found in hashes.values()) and len(set(hashes.values())) == 2
    assert native.source_hash("packed_patch_embed") == "", "which has no C++"


SMALL = "koleo", "--shapes", "small", "--dtype", "fp32", "--device", "cpu", "--budget", "5"


def test_a_file_that_is_no_store_is_told_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "tune", None)
    path = tmp_path / "configs" / "cpu.json"
    monkeypatch.setattr(lookup, "committed_store", lambda op, device: Store(path, device, sets_aside=False))
    path.parent.mkdir()
    for text in ("mine", '{"format": "mine"}'):
        path.write_text(text)
        result = invoke(*SMALL, "--commit")
        assert result.exit_code == 2 and result.stdout == ""
        assert re.fullmatch(r"error: .*cpu\.json holds no tuned launch knobs \(.*\): it stays\n", result.stderr)
        assert path.read_text() == text
        with pytest.raises(ForeignFileError, match="it stays"):
            lookup.committed_store("koleo", "cpu").put([])
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert "cpu.json is a file" in invoke(*SMALL).stderr


def test_a_hang_up_keeps_what_was_measured(cache, monkeypatch):
    def search(requests, worker, known, save, budget_s, report):
        (request,) = requests
        entry = Entry(request.op, request.dtype, request.shape, request=request.text, **request.state, tried=3)
        save([entry])
        report(tuner.Progress(request, 0, entry, 6))
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(tuner, "tune", search)
    monkeypatch.setattr(console, "INTERVAL_S", 0.0)
    result = invoke(*SMALL)
    (file,) = cache.iterdir()
    assert result.exit_code == 129 and result.stdout.endswith(f"kept in {file}\n")
    assert [entry["tried"] for entry in json.loads(file.read_text())["entries"]] == [3]
    told = r"0 of 1 requests: koleo float32 N=\d+ K=\d+ D=\d+, 3 of 6 candidates\n"  # without a terminal
    assert re.fullmatch(told, result.stderr)
