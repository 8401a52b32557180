"""Settings of the pytest-benchmark files: `pytest benchmarks/` times where `pytest` alone does not come here."""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the root holds `benchmarks`

import pytest
import torch

from benchmarks import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", help="operators, with commas (default: those with a fast backend here)")
    parser.addoption("--shapes", help="a named shape of their specs (default: each operator's first of a real model)")
    parser.addoption("--dtype", default="fp32", help="fp32,bf16 (default: fp32)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_enable = True  # the project's own options switch it off for tests


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info |= measure.machine_facts(device, "default")
