"""Comparisons with a result file and with a commit: verdicts, workers, environments; two fake sides from end to end."""

import argparse
import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import against, environment, run, turns, worker
from benchmarks.model.pair import Case, Check
from benchmarks.results import Row, append_rows, read_rows
from benchmarks.run import Plan
from benchmarks.turns import Point, Worker


def silent(*_: object, **__: object) -> None:
    pass


def point(old_ms: np.ndarray, new_ms: np.ndarray) -> Point:
    return Point("koleo b16 fp32", "forward", "stellar_fast.cpu", list(old_ms), list(new_ms))


@pytest.mark.parametrize(
    ("factor", "jitter", "verdict"),
    [(1.0, 0.01, "same"), (1.02, 0.002, "same"), (1.1, 0.01, "SLOWER"), (0.9, 0.01, "faster"), (1.1, 0.4, "same")],
)
def test_a_difference_counts_beyond_the_noise_of_the_run(factor: float, jitter: float, verdict: str) -> None:
    old, new = np.exp(jitter * np.random.default_rng(1).standard_normal((2, 30)))
    assert point(10 * old, 10 * factor * new).verdict == verdict


def test_a_slow_minute_of_both_sides_hides_no_slowdown() -> None:
    old, new = np.exp(0.01 * np.random.default_rng(1).standard_normal((2, 30)))
    slow = np.where(np.arange(30) % 15 < 4, 2.0, 1.0)
    found = point(slow * old, 1.1 * slow * new)
    assert found.verdict == "SLOWER"
    assert found.ratio.median == pytest.approx(1 / 1.1, rel=0.02)
    assert turns.LEAST_NOISE <= found.noise < 0.06


def result(**changes) -> Row:
    text = {field.name: "x" for field in dataclasses.fields(Row) if field.type is str}
    numbers = {field.name: 1 for field in dataclasses.fields(Row) if field.type is not str}
    usual = {"suite": "ops", "op": "koleo", "provider": "stellar_fast.cpu", "dtype": "fp32", "preset": "b16"}
    return Row(**text | numbers | usual | changes)


def speed(median: float, p20: float, p80: float) -> dict[str, float]:
    return {"ratio": median, "ratio_p20": p20, "ratio_p80": p80}


@pytest.mark.parametrize(
    ("now", "verdict"),
    [((2.5, 2.4, 2.6), "SLOWER"), ((2.8, 2.6, 3.0), "same"), ((3.5, 3.4, 3.6), "faster")],
)
def test_rows_are_held_against_the_last_of_the_same_measurement(tmp_path, now, verdict: str) -> None:
    path = tmp_path / "results.csv"
    before = [result(**speed(9, 9, 9)), result(dtype="bf16", **speed(1, 1, 1)), result(**speed(3, 2.9, 3.1))]
    append_rows(path, [*before, result(provider="plain", **speed(1, 1, 1))])
    rows = [result(**speed(*now)), result(provider="plain"), result(threads=8, **speed(*now))]
    report = against.with_file(rows, read_rows(path))
    (line,) = report.lines
    assert (line["verdict"], line["vs plain then"]) == (verdict, "3.00 (2.90 - 3.10)")
    assert report.left_out == ["koleo b16 fp32 x stellar_fast.cpu: the nearest has threads '1' instead of '8'"]
    assert report.failed == (["koleo b16 fp32 x stellar_fast.cpu"] if verdict == "SLOWER" else [])


def test_rows_without_a_ratio_are_shown_without_a_verdict(tmp_path) -> None:
    path = tmp_path / "results.csv"
    append_rows(path, [result(suite="scaling", ratio=float("nan"))])
    (line,) = against.with_file([result(suite="scaling", ratio=float("nan"))], read_rows(path)).lines
    assert line["verdict"] == "no ratio to plain"


def test_files_that_cannot_be_compared_are_refused(tmp_path) -> None:
    path = tmp_path / "results.csv"
    append_rows(path, [result(device_name="another")])
    with pytest.raises(ValueError, match="device_name 'another' instead of 'x'"):
        against.with_file([result()], read_rows(path))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns a,b but known are date,suite"):
        read_rows(path)


def fake_plans() -> dict[str, Plan]:
    def build() -> list[Case]:
        calls = dict.fromkeys(("plain", "stellar_fast", "unverified"), lambda: None)
        checks = {"plain": [Check("y", 0.1)], "stellar_fast": [Check("x", 0.2), Check("y", 1.5)]}
        return [Case("ops", "B=8", 1, 0.0, 0, calls, checks)]

    def fail() -> list[Case]:
        raise ImportError("no such function then")

    return {"good": Plan("good", "fp32", build, 1.0), "bad": Plan("bad", "fp32", fail, 1.0)}


def test_a_worker_answers_every_line() -> None:
    requests = [
        {"build": "good"},
        {"time": ["forward B=8", "stellar_fast"], "repeats": 3},
        {"time": ["backward", "stellar_fast"], "repeats": 1},
        {"build": "bad"},
        {"build": "new"},
    ]
    answers, ticks = io.StringIO(), iter([1.0, 5.0, 2.0])
    lines = io.StringIO("".join(json.dumps(request) + "\n" for request in requests))
    worker.serve(lines, answers, fake_plans(), lambda call: next(ticks))
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"errors": {"forward B=8": {"plain": 0.1, "stellar_fast": 1.5, "unverified": 0.0}}},
        {"ms": 2.0},
        {"error": "KeyError: 'backward'"},
        {"error": "ImportError: no such function then"},
        {"error": "ValueError: has no such operator or shape"},
    ]


def test_a_worker_process_times_this_package() -> None:
    arguments = ["--suite", "ops", "--op", "koleo", "--shapes", "small", "--dtype", "fp32"]
    options = run.parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name != "shape"}
    settings["op"] = ["koleo", "not_yet_written"]
    with Worker("now", [sys.executable, against.WORKER]) as side:
        facts = side.ask(options=settings, threads=1)
        assert facts["threads"] == 1 and facts["native"] == ""
        assert Path(facts["package"]).name == "__init__.py"
        errors = side.ask(build="koleo small fp32")["errors"]
        forward, backward = errors
        assert backward == "forward+backward N=2 K=5 D=12" and errors[backward]["stellar_fast.cpu"] < 1
        assert side.call_ms(forward, "stellar_fast.cpu", 2) > 0
        with pytest.raises(RuntimeError, match="flash of now fails when it is timed: KeyError"):
            side.call_ms(forward, "flash", 1)


def test_a_dead_worker_leaves_its_last_words() -> None:
    code = "import sys; print('kernel gone', file=sys.stderr); sys.exit(7)"
    with (
        Worker("abc", [sys.executable, "-c", code]) as side,
        pytest.raises(RuntimeError, match="worker of abc died with exit code 7:\nkernel gone"),
    ):
        side.ask(build="x")


FAKE_WORKER = """
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
old = os.environ.get("SIDE") == "old"
launches = here / "launches"
if not old:
    launches.write_text((launches.read_text() if launches.exists() else "") + "x")
plan = json.loads((here / "plan.json").read_text())
new_ms = plan["new_ms"]
for line in sys.stdin:
    message = json.loads(line)
    if "options" in message:
        answer = {"package": str(here / "env" / "p") if old else "now", "native": "", "torch": "2", "threads": 1}
        answer["native"] = plan.get("native", "") if old else ""
    elif "build" in message:
        answer = plan["old"] if old and "old" in plan else {"errors": {"forward": {"plain": 0, "stellar_fast": 0.5}}}
        answer = plan["new"] if not old and "new" in plan else answer
    else:
        answer = {"ms": 10.0 if old else new_ms[min(len(launches.read_text()), len(new_ms)) - 1]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two fake sides: run(plan) gives the exit code of a comparison, of which `plan` says what the workers answer."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nSIDE=old exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(against, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(against, "resolve", lambda commit: "a" * 40)
    monkeypatch.setattr(against, "environment", lambda sha, device: python)
    options = argparse.Namespace(rounds=8, budget=1.0, device="cpu", allocator="default")

    def compare(**plan) -> int:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        plans = list(fake_plans().values())[:1]
        return against.conclude(
            lambda: against.with_commit("HEAD~1", options, plans, silent), tell, lambda title, lines: tell(lines[0])
        )

    def tell(text: object) -> None:
        print(text)

    compare.options = options
    return compare


def test_the_same_speed_is_no_failure(fake, capsys) -> None:
    assert fake(new_ms=[10.1]) == 0
    assert "'processes x rounds': '1 x 8'" in capsys.readouterr().out


def test_a_slowdown_that_every_process_shows_fails(fake, capsys) -> None:
    assert fake(new_ms=[13.0, 12.0, 14.0]) == 1
    out = capsys.readouterr().out
    assert "'processes x rounds': '3 x 8'" in out and "'then / now (p20 - p80)': '0.83 (0.83 - 0.83)'" in out
    assert "SLOWER OR WRONG: good forward stellar_fast\n" in out


def test_a_slowdown_of_one_process_is_noise(fake, capsys) -> None:
    assert fake(new_ms=[13.0, 10.0]) == 0
    assert "'verdict': 'same'" in capsys.readouterr().out


def test_what_one_package_lacks_is_left_out(fake, capsys) -> None:
    both = {"errors": {"forward": {"stellar_fast": 0.5, "stellar_fast.cuda": 0.5}}}
    assert fake(new_ms=[10.0], new=both) == 0
    assert "left out: good forward stellar_fast.cuda: aaaaaaaaaaaa: has it not" in capsys.readouterr().out
    fewer = {"errors": {"forward": {"stellar_fast": 0.5}}}
    assert fake(new_ms=[10.0], new=fewer, old=both) == 0
    assert "left out: good forward stellar_fast.cuda: now: has it not" in capsys.readouterr().out
    assert fake(new_ms=[10.0], old={"error": "ImportError: x"}) == 2
    out = capsys.readouterr().out
    assert "left out: good: aaaaaaaaaaaa: ImportError: x" in out and "nothing to compare" in out


def test_what_is_wrong_now_fails(fake, capsys) -> None:
    assert fake(new_ms=[10.0], new={"errors": {"forward": {"stellar_fast": 3.0}}}) == 1
    assert "SLOWER OR WRONG: good forward stellar_fast: is WRONG, at 3 of its tolerance" in capsys.readouterr().out


def test_sides_that_cannot_be_compared_are_named(fake, capsys, tmp_path) -> None:
    (tmp_path / "env" / "build.log").write_text("g++: error\n")
    assert fake(new_ms=[10.0], native="not built") == 2
    assert "the commit's C++ does not build (not built):\ng++: error" in capsys.readouterr().out
    fake.options.rounds = 3
    assert fake(new_ms=[10.0]) == 2
    assert "at least 4 rounds but --rounds is 3" in capsys.readouterr().out


BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    if {broken}:
        raise SystemExit("no compiler today")
    with zipfile.ZipFile(folder + "/stellar_fast-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("stellar_fast/__init__.py", "VERSION = 'old'")
        info = "stellar_fast-0.1.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: stellar-fast\\nVersion: 0.1\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return "stellar_fast-0.1-py3-none-any.whl"
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "stellar-fast"
version = "0.1"
"""


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    """Of two commits, of which the second does not build."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "pyproject.toml").write_text(PROJECT)
    for broken in (False, True):
        (folder / "backend.py").write_text(BACKEND.format(broken=broken))
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "x")
    return folder


def test_an_environment_holds_the_commits_package_and_the_present_torch(repository, tmp_path, monkeypatch) -> None:
    sha = environment.resolve("HEAD~1", repository)
    assert sha == git(repository, "rev-parse", "HEAD~1")
    python = environment.environment(sha, "cpu", repository, tmp_path / "cache")
    code = "import importlib.util, stellar_fast; print(stellar_fast.VERSION, bool(importlib.util.find_spec('torch')))"
    out = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert out == "old True\n"
    assert git(repository, "worktree", "list").count("\n") == 0

    monkeypatch.setattr(environment, "_install", lambda *_: pytest.fail("built twice"))
    assert environment.environment(sha, "cpu", repository, tmp_path / "cache") == python


def test_a_commit_that_does_not_build_says_why(repository, tmp_path) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    with pytest.raises(ValueError, match=rf"commit {sha[:12]} does not build:\n[\s\S]*all of it: .*build.log"):
        environment.environment(sha, "cpu", repository, tmp_path / "cache")
    (log,) = (tmp_path / "cache").glob("*/build.log")
    assert "no compiler today" in log.read_text()
    assert git(repository, "worktree", "list").count("\n") == 0


@pytest.mark.parametrize("name", ["no-such-commit", "--help", ""])
def test_what_is_no_commit_is_named(repository, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is neither a file nor a commit"):
        environment.resolve(name, repository)


def test_run_exits_by_its_verdict(tmp_path, capsys) -> None:
    arguments = ["--suite", "ops", "--op", "koleo", "--shapes", "small", "--dtype", "fp32", "--rounds", "2"]
    assert run.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    (path,) = (tmp_path / "a").glob("*.csv")
    with path.open() as file:
        lines = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(line | dict.fromkeys(("ratio", "ratio_p20", "ratio_p80"), 1e3) for line in lines)
    assert run.main([*arguments, "--out", str(tmp_path / "a"), "--against", str(path)]) == 1
    assert "SLOWER OR WRONG: koleo small fp32 forward stellar_fast.cpu" in capsys.readouterr().out
    assert run.main([*arguments[:-2], "--against", "no-such-commit"]) == 2
    assert "'no-such-commit' is neither a file nor a commit" in capsys.readouterr().err
