import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.kernels.token_match.reference import transport_plan
from stellar_fast.ops import token_match
from tests.conftest import mismatches


def test_golden(golden_ops):
    pred, target, keep = (golden_ops[f"match.{name}"] for name in ("pred", "target", "filter"))
    assert torch.equal(token_match(pred[:, None], target)[:, 0], golden_ops["match.index"])
    filtered = token_match(pred[:, None], target, filter=keep)[:, 0]
    assert torch.equal(filtered, golden_ops["match.index_filtered"])
    plans = {"plan": transport_plan(pred, target), "plan_filtered": transport_plan(pred, target, keep)}
    assert mismatches(plans, {name: golden_ops[f"match.{name}"] for name in plans}) == []


@settings(deadline=None, max_examples=40)
@given(B=st.integers(1, 3), V=st.integers(1, 3), K=st.integers(1, 20), D=st.integers(2, 9), seed=st.integers(0, 20))
def test_equivariant_to_permutations_of_the_targets(B, V, K, D, seed):
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(B, V, K, D, generator=generator), torch.randn(B, K, D, generator=generator)
    order = torch.randperm(K, generator=generator)
    index, permuted = token_match(pred, target), token_match(pred, target[:, order])
    assert torch.equal(order[permuted], index)


def test_copies_find_themselves_and_ties_take_the_lowest():
    target = torch.eye(6)[None] * 3
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.equal(token_match(target[:, None, order], target)[0, 0], order)
    same = torch.ones(1, 4, 5)
    assert torch.equal(token_match(same[:, None], same), torch.zeros(1, 1, 4, dtype=torch.int64))


def test_every_view_is_matched_to_its_own_image():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 5, 4, generator=generator)
    pred = torch.stack([target[:, torch.randperm(5, generator=generator)] for _ in range(2)], dim=1)
    alone = torch.stack([token_match(pred[b : b + 1], target[b : b + 1])[0] for b in range(3)])
    assert torch.equal(token_match(pred, target), alone)
    assert token_match(pred[:0], target[:0]).shape == (0, 2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 5, 8)}, "target has K=5 but pred has K=4"),
        ({"filter": torch.zeros(2, 3)}, "filter has K=3 but pred has K=4"),
        ({"epsilon": -1.0}, "epsilon must be positive but is -1.0"),
    ],
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        token_match(**{"pred": torch.zeros(2, 3, 4, 8), "target": torch.zeros(2, 4, 8), **change})
