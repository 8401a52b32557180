"""Training with the fused operators follows the reference, on real photos."""

import torch

from benchmarks.model.trajectory import losses, reference_of_all
from stellar_fast import backend


def test_twenty_steps_as_the_reference():
    with backend.observe() as ran:
        fused = torch.tensor(losses(20, {}))
    assert {"sinkhorn", "prototype_cross_entropy", "token_match", "koleo"} <= {op for op, name in ran if name == "cpu"}
    torch.testing.assert_close(fused, torch.tensor(losses(20, reference_of_all())), rtol=1e-4, atol=0)
    assert fused[-1] < 0.7 * fused[0], "it does not learn"
