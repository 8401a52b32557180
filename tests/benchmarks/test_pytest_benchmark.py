"""`pytest benchmarks/` times the operators' cases, and writes what pytest-benchmark compares."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import test_ops

ROOT = Path(__file__).resolve().parents[2]


def test_operators_are_timed_with_their_rates(tmp_path) -> None:
    path = tmp_path / "found.json"
    arguments = ["benchmarks", "-p", "no:cacheprovider", "--op", "koleo", "--shapes", "small"]
    command = [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={path}"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    found = json.loads(path.read_text())
    names = [benchmark["name"] for benchmark in found["benchmarks"]]
    ways = [f"{d}-{p}" for d in ("forward", "forward+backward") for p in ("plain", "stellar_fast.cpu")]
    assert sorted(names) == sorted(f"test_op[koleo-small-fp32-{way}]" for way in ways)
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["gflop_per_s"] == pytest.approx(info["flops"] / benchmark["stats"]["median"] / 1e9)
        assert info["gb_per_s"] > 0 and benchmark["stats"]["rounds"] >= 5
    assert found["machine_info"]["torch"] and found["machine_info"]["threads"] >= 1


@pytest.mark.parametrize(("op", "dtype", "named"), [("koleo,fly", "fp32", "fly"), ("koleo", "int3", "int3")])
def test_what_is_unknown_is_named(op: str, dtype: str, named: str) -> None:
    options = {"op": op, "shapes": None, "dtype": dtype}
    collecting = SimpleNamespace(config=SimpleNamespace(getoption=options.get))
    with pytest.raises(pytest.UsageError, match=f"unknown '{named}': operators are add_layer_norm"):
        test_ops.pytest_generate_tests(collecting)


def test_pytest_alone_leaves_them_out(pytestconfig) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
