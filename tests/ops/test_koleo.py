import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.ops import koleo
from tests.conftest import mismatches


@pytest.mark.parametrize("case", ["koleo", "koleo_eps"])
def test_golden(golden_ops, case):
    x = golden_ops[f"{case}.x"].clone().requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert mismatches({"loss": loss}, {"loss": golden_ops[f"{case}.loss"]}) == []
    assert mismatches({"grad": x.grad}, {"grad": golden_ops[f"{case}.grad"]}, absolute=1e-4) == []


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 4), K=st.integers(2, 20), D=st.integers(1, 16), jitter=st.sampled_from([0.0, 1e-8, 1e-4, 1.0]))
def test_finite_for_identical_tokens(N, K, D, jitter):
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(N, 1, D, generator=generator) + jitter * torch.randn(N, K, D, generator=generator)
    x.requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_the_floor_bounds_loss_and_gradient():
    x = (torch.ones(1, 4, 8) + 1e-6 * torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    koleo(x).backward()
    assert x.grad.abs().max() > 1e4
    x.grad = None
    loss = koleo(x, min_distance=1e-3)
    loss.backward()
    assert x.grad.abs().max() == 0
    torch.testing.assert_close(loss.item(), -torch.log(torch.tensor(0.5e-3 + 1e-8)).item())


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="at least 2 tokens an image but x has 1"):
        koleo(torch.zeros(2, 1, 8))
    with pytest.raises(ValueError, match=r"x must have 3 dimensions \(NKD\) but its shape is \(2, 8\)"):
        koleo(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="min_distance must be at least 0 but is -1"):
        koleo(torch.zeros(1, 2, 8), min_distance=-1)
