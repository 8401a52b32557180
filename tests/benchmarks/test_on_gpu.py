"""benchmarks/on_gpu.sh with a Python that does nothing: stages, failures, time limits, what is left behind."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "on_gpu.sh"
STUB = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  "-c "*) echo 90a-real ;;
  *"--suite ops"*) echo from ops; exit 3 ;;
  *profile_step*) sleep 30 ;;
  *" tune "*) echo '{}' > kernels/linear/configs/new.json ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the script among empty sources, with one second for the profile."""
    for name in ("benchmarks", "csrc/nearest_code", "csrc/build_info", "kernels/linear/configs", "tests/ops"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    script = tmp_path / "benchmarks" / "on_gpu.sh"
    script.write_text(script.read_text().replace("[profile]=25", "[profile]=1"))
    for name in ("csrc/nearest_code/nearest_code_cuda.cu", "csrc/build_info/build_info_cuda.cu"):
        (tmp_path / name).touch()
    (tmp_path / "tests/ops/test_nearest_code.py").touch()
    (tmp_path / "kernels/linear/configs/old.json").write_text("{}")
    os.utime(tmp_path / "kernels/linear/configs/old.json", (0, 0))
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def call(checkout: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished script, and the arguments of every call of Python."""
    calls = checkout / "calls"
    environment = {**os.environ, "PYTHON": str(checkout / "python"), "CALLS": str(calls)}
    environment["PATH"] = f"{checkout}:{environment['PATH']}"
    command = ["bash", str(checkout / "benchmarks" / "on_gpu.sh"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return run, calls.read_text().splitlines() if calls.exists() else []


def table(run: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Stage, exit code, seconds and remarks at the end of what the script printed."""
    lines = run.stdout.splitlines()
    start = max(i for i, line in enumerate(lines) if line.split() == ["stage", "exit", "code", "seconds"])
    return [line.split() for line in lines[start + 1 :]]


def test_all_stages_report_and_one_that_fails_stops_none(checkout) -> None:
    run, calls = call(checkout)
    stages = ["build", "tests", "tune", "ops", "objective", "models", "pixels", "profile", "sanitizer"]
    assert [line[0] for line in table(run)] == stages
    codes = {stage: int(code) for stage, code, *_ in table(run)}
    assert {stage for stage, code in codes.items() if code} == {"ops", "profile"}
    assert codes["ops"] == 3 and codes["profile"] == 124
    assert table(run)[-2][3:] == ["cut", "off", "at", "1", "s"]
    assert run.returncode == 1

    out = checkout / "on_gpu_out"
    assert (out / "ops.log").read_text() == "from ops\n"
    assert [path.name for path in out.glob("configs/**/*.json")] == ["new.json"]
    assert (out / "stages.txt").read_text() in run.stdout
    (install,) = (line for line in calls if "pip install" in line)
    assert "--no-deps --no-build-isolation" in install
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real" in install
    (sanitized,) = (line for line in calls if "--error-exitcode" in line)
    assert sanitized.endswith("tests/ops/test_nearest_code.py")
    (tuned,) = (line for line in calls if " tune " in line)
    assert "tune --preset b16 --batch 128 --dtype bf16 --device cuda --budget 60 --commit" in tuned
    assert any("--suite encode,step --batch 128" in line and "--out on_gpu_out" in line for line in calls)


def test_chosen_stages_run_in_their_order(checkout, tmp_path) -> None:
    run, calls = call(checkout, "--out", str(tmp_path / "there"), "models", "tests")
    assert run.returncode == 0
    assert [line[:2] for line in table(run)] == [["models", "0"], ["tests", "0"]]
    assert len(calls) == 2 and "-m pytest -m cuda" in calls[1]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["models.log", "stages.txt", "tests.log"]


def test_an_unknown_stage_is_named_before_anything_runs(checkout) -> None:
    run, calls = call(checkout, "build", "fly")
    assert (run.returncode, calls) == (2, [])
    assert "unknown stage fly; stages: build tests" in run.stderr


def test_default_stages_fit_into_ten_minutes() -> None:
    code = SCRIPT.read_text().split("STAGES=")[0].split("cd ")[0]
    body = SCRIPT.read_text()
    settings = body[body.index("ALL=(") : body.index("STAGES=")]
    total = 'for stage in "${ALL[@]}"; do total=$((${total:-0} + LIMIT_S[$stage] + 5)); done; echo $total'
    run = subprocess.run(["bash", "-c", settings + total], capture_output=True, text=True, check=True)
    assert code.startswith("#!") and 0 < int(run.stdout) < 600, "with the grace of a stage that has to be killed"
