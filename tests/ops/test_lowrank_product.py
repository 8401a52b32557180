"""lowrank_product by every backend, against the golden tensors and an own formula in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast import backend as backends
from stellar_fast.backend import OPS
from stellar_fast.ops import lowrank_product
from tests.conftest import mismatches
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory
from tests.roundings import assert_alike

ON_CPU = [name for name in OPS["lowrank_product"] if name != "triton"]


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


@each_backend("lowrank_product")
@each_dtype("lowrank_product")
@each_shape("lowrank_product")
def test_no_worse_than_eager(backend, device, dtype, shape):
    if backend == "cpu" and dtype == torch.float16:
        x = torch.zeros(1, 1, 1, dtype=dtype)
        with backends.use_backend(lowrank_product="cpu"), pytest.raises(ValueError, match=r"compute in torch.float16"):
            lowrank_product(x, x, x)
        return
    check_op("lowrank_product", backend, shape, dtype, device)


@each_backend("lowrank_product")
@pytest.mark.parametrize("changed", [{"temperature": None}, {"temperature": 1.0, "bias": None}], ids=str)
def test_other_arguments(backend, device, changed):
    check_op("lowrank_product", backend, device=device, **changed)


@each_backend("lowrank_product")
@pytest.mark.parametrize("return_localization", [True, False])
def test_registration(backend, device, return_localization):
    check_registered("lowrank_product", backend, device=device, return_localization=return_localization)


@each_backend("lowrank_product")
def test_golden_with_norms_so_small_that_the_epsilon_shows(golden_ops, backend, device):
    dense, sparse = golden_ops["localize_eps.dense"].to(device), golden_ops["localize_eps.sparse"].to(device)
    with backends.use_backend(lowrank_product=backend):
        _, localization, _ = lowrank_product(dense, sparse, sparse, return_localization=True)
    assert mismatches({"out": localization.cpu()}, {"out": golden_ops["localize_eps.out"]}) == []


@each_backend("lowrank_product")
def test_gradients_of_rows_below_above_and_at_zero_norm(backend, device):
    """Below the epsilon the norm is a constant: the gradient has no part along the row taken out."""
    norms = torch.tensor([0.0, 1e-9, 0.5e-7, 2e-7, 1e-3, 1.0, 1e4])[:, None]
    query = norms * torch.nn.functional.normalize(draw(2, 7, 12), dim=-1)
    key = norms[[1, 3, 5, 0]] * torch.nn.functional.normalize(draw(2, 4, 12, seed=1), dim=-1)
    inputs = [query, key, draw(2, 4, 5, seed=2)]
    along = draw(2, 7, 5, seed=3)
    expected = [x.double().requires_grad_() for x in inputs]
    exact(*expected, 0.06)[0].backward(along.double())
    leaves = [x.to(device).requires_grad_() for x in inputs]
    with backends.use_backend(lowrank_product=backend), backends.observe() as seen:
        lowrank_product(*leaves)[0].backward(along.to(device))
    assert {name for _, name in seen} == {backend} - {"reference"}
    for have, want in zip(leaves, expected, strict=True):
        rows = want.grad.norm(dim=-1)
        assert ((have.grad.cpu().double() - want.grad).norm(dim=-1) <= 1e-3 * rows + 1e-9).all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("temperature", [0.06, 0.5, None])
@pytest.mark.parametrize(("B", "P", "K", "D", "E"), [(2, 16, 4, 8, 8), (1, 7, 1, 5, 3), (3, 1, 24, 16, 9)])
def test_values_and_gradients(backend, temperature, B, P, K, D, E):
    inputs = [draw(B, P, D), draw(B, K, D, seed=1), draw(B, K, E, seed=2), draw(P, E, seed=3)]
    inputs = [x.requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    with backends.use_backend(lowrank_product=backend):
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


@pytest.mark.parametrize("backend", ON_CPU)
@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(0, 3),
    P=st.integers(1, 80),
    K=st.integers(1, 64),
    D=st.integers(1, 40),
    temperature=st.sampled_from([0.06, 1.0, None]),
    scale=st.sampled_from([1e-9, 1.0, 1e4]),
)
def test_rows_of_the_localization_are_distributions(backend, B, P, K, D, temperature, scale):
    if temperature is None and scale > 1:
        scale = 1.0
    query, key = scale * draw(B, P, D), scale * draw(B, K, D, seed=1)
    with backends.use_backend(lowrank_product=backend):
        out, localization, peak = lowrank_product(query, key, key, temperature=temperature, return_localization=True)
    assert_alike(localization.sum(-1), torch.ones(B, P))
    assert (localization >= 0).all()
    assert out.shape == (B, P, D)
    assert torch.equal(peak, localization.amax(1))


@pytest.mark.parametrize("backend", ON_CPU)
def test_dtypes_may_differ(backend):
    """As under autocast, where projections give bf16 and LayerNorm gives fp32."""
    inputs = [draw(2, 9, 24, dtype=torch.bfloat16), draw(2, 4, 24, dtype=torch.bfloat16, seed=1), draw(2, 4, 7, seed=2)]
    widened = [x.float().requires_grad_() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    with backends.use_backend(lowrank_product=backend), torch.autocast("cpu", torch.bfloat16):
        out, _, _ = lowrank_product(*leaves)
    with backends.use_backend(lowrank_product=backend):
        expected, _, _ = lowrank_product(*widened)
    assert_alike(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for have, want in zip(leaves, widened, strict=True):
        assert_alike(have.grad, want.grad.to(have.dtype))


@pytest.mark.parametrize(("B", "P"), [(1, 300), (3, 130), (9, 20)])
def test_any_number_of_threads(B, P):
    """Few images are split by patches: sums in another order, the same for the same number of threads."""
    inputs = [draw(B, P, 20), draw(B, 6, 20, seed=1), draw(B, 6, 18, seed=2)]
    along = draw(B, P, 18, seed=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in inputs]
            with backends.use_backend(lowrank_product="cpu"):
                out, localization, peak = lowrank_product(*leaves, return_localization=True)
            results.append([out, localization, peak, *torch.autograd.grad(out, leaves, along)])
    finally:
        torch.set_num_threads(before)
    one, three, again = results
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))
    for a, b in zip(one, three, strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize(("letter", "size"), [("P", 4097), ("K", 65), ("D", 2049), ("E", 2049)])
def test_beyond_the_kernels_sizes_the_reference_computes(letter, size):
    B, P, K, D, E = ({"B": 1, "P": 3, "K": 2, "D": 4, "E": 4} | {letter: size}).values()
    inputs = draw(B, P, D), draw(B, K, D, seed=1), draw(B, K, E, seed=2)
    with backends.observe() as seen:
        out, _, _ = lowrank_product(*inputs)
    assert not seen
    assert mismatches({"out": out}, {"out": exact(*inputs, 0.06)[0]}) == []
    with (
        backends.use_backend(lowrank_product="cpu"),
        pytest.raises(ValueError, match=f"{letter} {size} is above {size - 1}"),
    ):
        lowrank_product(*inputs)


def test_forward_mode_is_exact():
    query, key, tangent = draw(1, 5, 8), draw(1, 3, 8, seed=1), draw(1, 5, 8, seed=2)
    _, ours = torch.func.jvp(lambda x: lowrank_product(x, key, key)[0], (query,), (tangent,))
    with backends.use_backend("reference"):
        _, expected = torch.func.jvp(lambda x: lowrank_product(x, key, key)[0], (query,), (tangent,))
    assert torch.equal(ours, expected) and expected.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("P", [20, 150])
def test_nan_and_infinity_show(dtype, P):
    query, key = draw(1, P, 8, dtype=dtype), draw(1, 3, 8, seed=1, dtype=dtype)
    query[0, 4, 2], query[0, 11, 0] = math.nan, math.inf
    results = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # two tasks where there are patches enough
        for name in ("cpu", "reference"):
            with backends.use_backend(lowrank_product=name):
                results.append(lowrank_product(query, key, key))
    finally:
        torch.set_num_threads(before)
    (out, _, peak), (expected, _, expected_peak) = results
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any(-1).sum() == 2
    assert peak.isnan().all() and expected_peak.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 4, 7)}, "key has D=7 but query has D=8"),
        ({"value": torch.zeros(2, 5, 3)}, "value has K=5 but key has K=4"),
        ({"query": torch.zeros(3, 8)}, r"query must have 3 dimensions \(BPD\) but its shape is \(3, 8\)"),
        ({"query": torch.zeros(2, 0, 8)}, "P must be positive but is 0"),
        ({"bias": torch.zeros(15, 6)}, "bias has P=15 but query has P=16"),
        ({"temperature": 0.0}, "temperature must be positive but is 0.0"),
        ({"query": torch.zeros(2, 16, 8, dtype=torch.int64)}, "query must be floating point but is torch.int64"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"query": torch.zeros(2, 16, 8), "key": torch.zeros(2, 4, 8), "value": torch.zeros(2, 4, 6)} | change
    with pytest.raises(ValueError, match=message):
        lowrank_product(**arguments)


@each_backend("lowrank_product", "triton")
@pytest.mark.parametrize("temperature", [0.06, None])
def test_triton_sums_over_tiles_slices_and_splits(backend, device, temperature):
    """Small tiles: 5 blocks of patches in 3 splits, 3 slices of D, 5 of E; the same result every time."""
    from stellar_fast.kernels.lowrank_product.config import Config, Tile
    from stellar_fast.kernels.lowrank_product.kernel import launch_lowrank_product_bwd, launch_lowrank_product_fwd

    B, P, K, D, E = 2, 70, 17, 47, 65
    tile = Tile(block_p=16, block_d=16, block_e=16, num_warps=4, num_stages=2)
    config = Config(tile, tile, splits=3)
    inputs = [draw(B, P, D), draw(B, K, D, seed=1), draw(B, K, E, seed=2)]
    along, along_map = draw(B, P, E, seed=4), draw(B, P, K, seed=5)
    doubles = [x.double().requires_grad_() for x in inputs]
    want, weights = exact(*doubles, temperature)
    ((want * along).sum() + (weights * along_map).sum()).backward()
    expected = {"out": want, "map": weights, "peak": weights.amax(1)}
    expected |= {name: x.grad for name, x in zip(("query", "key", "value"), doubles, strict=True)}

    inputs, along, along_map = [x.to(device) for x in inputs], along.to(device), along_map.to(device)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            out, localization, peak, *saved = launch_lowrank_product_fwd(*inputs, temperature, None, True, config)
            grads = launch_lowrank_product_bwd(along, along_map, *inputs, *saved, temperature, config)
        results = (out, localization, peak, *grads)
        runs.append({name: x.cpu() for name, x in zip(expected, results, strict=True)})
    assert mismatches(runs[0], expected, absolute=1e-4) == []
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in expected)


@each_backend("lowrank_product", "triton")
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16, torch.float16)],
    ids=["as_under_autocast", "all_differ"],
)
def test_triton_takes_dtypes_that_differ(backend, device, dtypes):
    sizes = ((2, 19, 24), (2, 4, 24), (2, 4, 7))
    leaves = [draw(*size, seed=i, dtype=dtype) for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))]
    along = draw(2, 19, 7, seed=3)
    doubles = [x.double().requires_grad_() for x in leaves]
    want, _ = exact(*doubles, 0.06)
    want.backward(along.double())
    leaves = [x.to(device).requires_grad_() for x in leaves]
    with backends.use_backend(lowrank_product=backend):
        out, _, _ = lowrank_product(*leaves)
    out.backward(along.to(device))
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=1e-4)
    for have, exactly in zip(leaves, doubles, strict=True):
        assert have.grad.dtype == have.dtype
        error = (have.grad.cpu().double() - exactly.grad).abs().max() / exactly.grad.abs().max()
        assert error < {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[have.dtype]
