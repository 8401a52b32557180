"""Training with the fused operators follows the reference, on real photos."""

import numpy as np
import pytest
import torch

from benchmarks.model import trajectory
from benchmarks.model.trajectory import losses, reference_of_all
from stellar_fast import backend


def test_twenty_steps_as_the_reference():
    with backend.observe() as ran:
        fused = torch.tensor(losses(20, {}))
    assert {"sinkhorn", "prototype_cross_entropy", "token_match", "koleo"} <= {op for op, name in ran if name == "cpu"}
    torch.testing.assert_close(fused, torch.tensor(losses(20, reference_of_all())), rtol=1e-4, atol=0)
    assert fused[-1] < 0.7 * fused[0], "it does not learn"


@pytest.mark.parametrize(
    ("step", "distance", "said"),
    [
        (None, 0.0, []),
        (19, 2e-4, ["step 20 is 2.00e-04 from the reference: at most 0.0001 is allowed"]),
        (0, float("nan"), ["step 1 is nan from the reference: at most 0.0001 is allowed"]),
        (20, 2e-4, []),
        (slice(20, None), 3e-3, ["median of the later half 3.00e-03, above the nudged runs' largest 2.00e-03"]),
    ],
)
def test_runs_that_part_are_named(tmp_path, monkeypatch, capsys, step, distance: float, said: list[str]) -> None:
    """The nudged runs are 1e-3 and 2e-3 away, the fused one 1e-5 but for what is set."""
    found = {"fused": np.full(40, 1e-5), "nudged": np.array([[1e-3], [2e-3]]).repeat(40, axis=1), "loss": np.ones(40)}
    if step is not None:
        found["fused"][step] = distance
    monkeypatch.setattr(trajectory, "compare", lambda steps: found)
    monkeypatch.setattr("sys.argv", ["trajectory", "--steps", "40", "--out", str(tmp_path / "plot.png")])
    assert trajectory.main() == (1 if said else 0)
    assert capsys.readouterr().err.splitlines() == [f"WRONG: {text}" for text in said]
