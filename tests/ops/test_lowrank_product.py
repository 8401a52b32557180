import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.ops import lowrank_product
from tests.conftest import mismatches


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(query, key, value, temperature, bias=None):
    """The formula in fp64, a loop over images."""
    outs, maps = [], []
    for q, k, v in zip(query.double(), key.double(), value.double(), strict=True):
        if temperature is None:
            logits = q @ k.T / math.sqrt(q.shape[-1])
        else:
            q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            logits = q @ k.T / temperature
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        maps.append(weights)
        outs.append(weights @ v + (0 if bias is None else bias.double()))
    return torch.stack(outs), torch.stack(maps)


def test_golden_with_norms_so_small_that_the_epsilon_shows(golden_ops):
    dense, sparse = golden_ops["localize_eps.dense"], golden_ops["localize_eps.sparse"]
    _, localization, _ = lowrank_product(dense, sparse, sparse, return_localization=True)
    assert mismatches({"out": localization}, {"out": golden_ops["localize_eps.out"]}) == []


@pytest.mark.parametrize("temperature", [0.06, 0.5, None])
@pytest.mark.parametrize(("B", "P", "K", "D", "E"), [(2, 16, 4, 8, 8), (1, 7, 1, 5, 3), (3, 1, 24, 16, 9)])
def test_values_and_gradients(temperature, B, P, K, D, E):
    inputs = [draw(B, P, D), draw(B, K, D, seed=1), draw(B, K, E, seed=2), draw(P, E, seed=3)]
    inputs = [x.requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, localization, peak = lowrank_product(
        *inputs[:3], temperature=temperature, bias=inputs[3], return_localization=True
    )
    want, weights = exact(*doubles[:3], temperature, doubles[3])
    assert mismatches({"out": out, "map": localization}, {"out": want, "map": weights}) == []
    assert torch.equal(peak, localization.amax(1))
    assert not peak.requires_grad
    direction, along = draw(B, P, E, seed=4), draw(B, P, K, seed=5)
    ((out * direction).sum() + (localization * along).sum()).backward()
    ((want * direction).sum() + (weights * along).sum()).backward()
    names = ("query", "key", "value", "bias")
    have = {name: x.grad for name, x in zip(names, inputs, strict=True)}
    expected = {name: x.grad for name, x in zip(names, doubles, strict=True)}
    assert mismatches(have, expected, absolute=1e-4) == []


@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(0, 3),
    P=st.integers(1, 40),
    K=st.integers(1, 33),
    D=st.integers(1, 20),
    temperature=st.sampled_from([0.06, 1.0, None]),
    scale=st.sampled_from([1e-9, 1.0, 1e4]),
)
def test_rows_of_the_localization_are_distributions(B, P, K, D, temperature, scale):
    if temperature is None and scale > 1:
        scale = 1.0
    query, key = scale * draw(B, P, D), scale * draw(B, K, D, seed=1)
    out, localization, _ = lowrank_product(query, key, key, temperature=temperature, return_localization=True)
    torch.testing.assert_close(localization.sum(-1), torch.ones(B, P))
    assert (localization >= 0).all()
    assert out.shape == (B, P, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 4, 7)}, "key has D=7 but query has D=8"),
        ({"value": torch.zeros(2, 5, 3)}, "value has K=5 but key has K=4"),
        ({"query": torch.zeros(3, 8)}, r"query must have 3 dimensions \(BPD\) but its shape is \(3, 8\)"),
        ({"bias": torch.zeros(15, 6)}, "bias has P=15 but query has P=16"),
        ({"temperature": 0.0}, "temperature must be positive but is 0.0"),
        ({"query": torch.zeros(2, 16, 8, dtype=torch.int64)}, "query must be floating point but is torch.int64"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"query": torch.zeros(2, 16, 8), "key": torch.zeros(2, 4, 8), "value": torch.zeros(2, 4, 6)} | change
    with pytest.raises(ValueError, match=message):
        lowrank_product(**arguments)
