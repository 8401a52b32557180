"""Triton kernels on the CPU: the tests marked `interpreter`, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_triton_kernels_under_the_interpreter() -> None:
    # a process of its own: triton reads the variable when it defines a kernel, so one process has one kind of kernel
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "interpreter", "-q", "-p", "no:cacheprovider", "--durations=10"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) >= 1, output
