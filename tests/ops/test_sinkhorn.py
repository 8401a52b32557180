import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.ops import sinkhorn_knopp
from tests.conftest import mismatches


@pytest.mark.parametrize(
    ("logits", "expected", "scale"),
    [
        ("sinkhorn.logits_over_temp", "sinkhorn.out_scale1", 1.0),
        ("sinkhorn.logits_over_temp", "sinkhorn.out_scale0.7", 0.7),
        ("sinkhorn_outliers.logits_over_temp", "sinkhorn_outliers.out", 1.0),
    ],
)
def test_golden(golden_ops, logits, expected, scale):
    have = sinkhorn_knopp(golden_ops[logits], temperature=1.0, scale=scale)
    assert mismatches({"out": have}, {"out": golden_ops[expected]}, absolute=1e-8) == []


def test_golden_head_with_small_features(golden_ops):
    logits = golden_ops["head_eps.logits"].flatten(0, 1)
    expected = golden_ops["head_eps.assignments"].flatten(0, 1)
    assert mismatches({"out": sinkhorn_knopp(logits)}, {"out": expected}) == []


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(1, 30), seed=st.integers(0, 10), scale=st.sampled_from([0.5, 1.0]))
def test_marginals(rows, columns, seed, scale):
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    targets = sinkhorn_knopp(logits, temperature=1.0, scale=scale)
    torch.testing.assert_close(targets.sum(1), torch.ones(rows), rtol=1e-4, atol=1e-4)
    assert (targets >= 0).all()
    if scale == 1.0:  # more rounds bring the columns to equal shares as well
        many = sinkhorn_knopp(logits, temperature=1.0, iterations=300)
        torch.testing.assert_close(many.sum(0), torch.full((columns,), rows / columns), rtol=1e-2, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 10))
def test_finite_for_logits_a_thousand_times_larger(rows, columns, seed):
    logits = 1000 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    targets = sinkhorn_knopp(logits)
    assert targets.isfinite().all()
    assert (targets.sum(1) <= 1 + 1e-4).all()


def test_no_gradient_and_wrong_input():
    logits = torch.randn(4, 8, requires_grad=True)
    assert not sinkhorn_knopp(logits).requires_grad
    with pytest.raises(ValueError, match=r"logits must have 2 dimensions \(RC\) but its shape is \(2, 2, 2\)"):
        sinkhorn_knopp(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="iterations must be positive but is 0"):
        sinkhorn_knopp(logits, iterations=0)


def two_ranks(rank, file, logits, expected):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        have = sinkhorn_knopp(logits.chunk(2)[rank], group=torch.distributed.group.WORLD)
        torch.testing.assert_close(have, expected.chunk(2)[rank], rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_give_what_one_gives_on_the_joined_rows(tmp_path):
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    arguments = (str(tmp_path / "rendezvous"), logits, sinkhorn_knopp(logits))
    torch.multiprocessing.spawn(two_ranks, arguments, nprocs=2)
