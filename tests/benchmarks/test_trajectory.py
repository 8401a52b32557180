"""Training with the fused operators follows the reference, on real photos."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.model import trajectory
from benchmarks.model.trajectory import losses, problems, reference_of_all
from stellar_fast import backend

STEPS = 8


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """The reference's losses, and those of the nudged runs."""
    runs = [losses(STEPS, reference_of_all(), seed) for seed in (None, 0, 1, 2)]
    return {"loss": np.array(runs[0]), "nudged": np.abs(np.array(runs[1:]) / runs[0] - 1)}


def said_of(found: list[float], reference: dict[str, np.ndarray]) -> list[str]:
    steps = len(found)
    fused = np.abs(np.array(found) / reference["loss"][:steps] - 1)
    return problems({"fused": fused, "nudged": reference["nudged"][:, :steps]})


def test_the_first_steps_are_those_of_the_reference(reference):
    with backend.observe() as ran:
        fused = losses(STEPS, {})
    assert {"sinkhorn", "prototype_cross_entropy", "token_match", "koleo"} <= {op for op, name in ran if name == "cpu"}
    assert said_of(fused, reference) == []
    assert fused[-1] < 0.8 * fused[0], "it does not learn"


class Factor(torch.autograd.Function):
    """x times `forward`, whose gradient is times `backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


@pytest.mark.parametrize(
    ("module", "operator", "factors"),
    [
        ("stellar_fast.nn.vit", "token_self_attention", (1.001, 1.0)),
        ("stellar_fast.nn.linear", "linear", (1.001, 1.0)),
        ("stellar_fast.nn.linear", "linear", (1.0, 1.001)),
        ("stellar_fast.nn.prototype_head", "prototype_cross_entropy", (1.001, 1.0)),
    ],
    ids=["attention", "linear", "linear backward", "prototypes"],
)
def test_an_operator_that_is_off_by_a_thousandth_is_found(reference, monkeypatch, module, operator, factors):
    right = getattr(sys.modules[module], operator)
    monkeypatch.setattr(sys.modules[module], operator, lambda *a, **k: Factor.apply(right(*a, **k), *factors))
    (said,) = said_of(losses(4, {}), reference)
    assert said.startswith("step ")


@pytest.mark.parametrize(
    ("step", "distance", "said"),
    [
        (None, 0.0, []),
        (19, 1.9e-2, []),
        (19, 2.1e-2, ["step 20 is 2.10e-02 from the reference, over 10 times the nudged runs' 2.00e-03"]),
        (0, 1.1e-3, ["step 1 is 1.10e-03 from the reference, over 10 times the nudged runs' 1.00e-04"]),
        (30, float("nan"), ["step 31 is nan from the reference, over 10 times the nudged runs' 2.00e-03"]),
    ],
)
def test_runs_that_part_are_named(tmp_path, monkeypatch, capsys, step, distance: float, said: list[str]) -> None:
    """The nudged runs are 1e-4 away at first, then once 1e-3 and 2e-3, the fused one 1e-5 but for what is set."""
    nudged = np.full((2, 40), 1e-4)
    nudged[:, 10] = 1e-3, 2e-3
    found = {"fused": np.full(40, 1e-5), "nudged": nudged, "loss": np.ones(40)}
    if step is not None:
        found["fused"][step] = distance
    monkeypatch.setattr(trajectory, "compare", lambda steps: found)
    monkeypatch.setattr("sys.argv", ["trajectory", "--steps", "40", "--out", str(tmp_path / "plot.png")])
    assert trajectory.main() == (1 if said else 0)
    assert capsys.readouterr().err.splitlines() == [f"WRONG: {text}" for text in said]
