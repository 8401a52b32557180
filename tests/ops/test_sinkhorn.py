from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stellar_fast.backend import use_backend
from stellar_fast.kernels.sinkhorn import reference
from stellar_fast.kernels.sinkhorn.spec import POTENTIALS, SPEC
from stellar_fast.ops import SinkhornTargets, sinkhorn_knopp, sinkhorn_potentials
from stellar_fast.ops.sinkhorn import near_their_peaks
from stellar_fast.registry import OpSpec, Shape
from tests.conftest import mismatches
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory
from tests.ranks import run_two_ranks

FUNCTIONS = pytest.mark.parametrize("spec", [SPEC, POTENTIALS], ids=["knopp", "potentials"])


def draw(*size: int, seed: int = 0, deviation: float = 1.0) -> Tensor:
    return deviation * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_as_asked(have: Tensor, want: Tensor) -> None:
    """Within 2e-5 of entries above 1e-8, within 1e-9 of the others."""
    large = want > 1e-8
    assert have.shape == want.shape and have.isfinite().all()
    assert ((have - want).abs() / want)[large].max() < 2e-5
    assert not (~large).any() or (have - want).abs()[~large].max() < 1e-9


def check(spec: OpSpec, backend: str, shape: Shape, dtype: torch.dtype, device: str, **options: Any) -> None:
    if backend == "cpu" and dtype == torch.float16:
        with use_backend(sinkhorn="cpu"), pytest.raises(ValueError, match=r"it does not compute in torch\.float16"):
            spec.function(draw(3, 4).to(dtype))
    elif spec is POTENTIALS and shape == {"R": 1, "C": 1}:
        # the row's is zero but for the rounding of a score, which eager subtracts from itself
        with use_backend(sinkhorn=backend):
            assert abs(spec.function(torch.ones(1, 1, dtype=dtype, device=device))[0].item()) < 1e-6
    else:
        check_op(spec, backend, shape, dtype, device, **options)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("logits", "expected", "scale"),
    [
        ("sinkhorn.logits_over_temp", "sinkhorn.out_scale1", 1.0),
        ("sinkhorn.logits_over_temp", "sinkhorn.out_scale0.7", 0.7),
        ("sinkhorn_outliers.logits_over_temp", "sinkhorn_outliers.out", 1.0),
    ],
)
def test_golden(golden_ops, logits, expected, scale, name):
    with use_backend(sinkhorn=name):
        have = sinkhorn_knopp(golden_ops[logits], temperature=1.0, scale=scale)
        row, column = sinkhorn_potentials(golden_ops[logits], temperature=1.0, scale=scale)
    lazy = SinkhornTargets(row, column, 1.0, golden_ops[logits]).assignments()
    want = golden_ops[expected]
    assert mismatches({"knopp": have, "potentials": lazy}, {"knopp": want, "potentials": want}, absolute=1e-8) == []


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_golden_head_with_small_features(golden_ops, name):
    logits = golden_ops["head_eps.logits"].flatten(0, 1)
    expected = golden_ops["head_eps.assignments"].flatten(0, 1)
    with use_backend(sinkhorn=name):
        assert mismatches({"out": sinkhorn_knopp(logits)}, {"out": expected}) == []


@FUNCTIONS
@each_backend("sinkhorn", "cpu", "reference")
@each_dtype("sinkhorn")
@each_shape("sinkhorn", {"R": 72, "C": 1003}, {"R": 9, "C": 64})
def test_no_worse_than_eager(backend, device, dtype, shape, spec):
    check(spec, backend, shape, dtype, device)


@FUNCTIONS
@each_backend("sinkhorn", "triton")
@each_dtype("sinkhorn")
def test_triton_no_worse_than_eager(backend, device, dtype, spec):
    check_op(spec, backend, "small", dtype, device)


@FUNCTIONS
@each_backend("sinkhorn", "triton")
@each_shape("sinkhorn")
def test_triton_shapes(backend, device, shape, spec):
    check(spec, backend, shape, torch.float32, device, layouts=("sliced",))


@FUNCTIONS
@each_backend("sinkhorn")
def test_registration(backend, device, spec):
    check_registered(spec, backend, device=device)


@each_backend("sinkhorn")
def test_statistics(backend, device):
    check_op(POTENTIALS, backend, {"R": 33, "C": 70}, torch.float32, device, layouts=("contiguous",), statistics=True)
    logits = draw(5, 37).to(device)
    logits[:, 30] = logits[:, 7]  # equal columns: the first of them is named
    logits[2, 7] = logits[2, 30] = 5.0
    with use_backend(sinkhorn=backend):
        row, column, entropy, first = sinkhorn_potentials(logits, temperature=1.0, statistics=True)
    t = SinkhornTargets(row, column, 1.0, logits).assignments()
    torch.testing.assert_close(entropy, torch.special.entr(t).sum(1))
    assert first.dtype == torch.int64 and torch.equal(first, t.argmax(1)) and first[2] == 7


@each_backend("sinkhorn", "cpu", "reference")
@pytest.mark.parametrize("rows", [1, 5, 72, 515])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_ordinary_logits_give_the_published_formula(backend, device, rows, scale):
    """Scores of standard deviation 17, as those of a head with prototypes from N(0, 1)."""
    logits = draw(rows, 2005, seed=rows)
    want = reference.sinkhorn_knopp(logits, scale=scale)
    with use_backend(sinkhorn=backend):
        assert_as_asked(sinkhorn_knopp(logits, scale=scale), want)
        row, column = sinkhorn_potentials(logits, scale=scale)
    assert_as_asked(SinkhornTargets(row, column, 0.06, logits).assignments(), want)
    assert_as_asked((logits / 0.06 + row[:, None] + column).exp(), want)


@each_backend("sinkhorn", "triton")
def test_triton_gives_the_published_formula(backend, device):
    logits = draw(9, 210)
    with use_backend(sinkhorn=backend):
        assert_as_asked(sinkhorn_knopp(logits.to(device)).cpu(), reference.sinkhorn_knopp(logits))


def outlier_rows() -> Tensor:
    """Scores of two rows lie so far below all others that the 1e-8 decides their sums."""
    logits = draw(12, 40, seed=3)
    logits[4] -= 16.0
    logits[7] -= 50.0
    return logits


HARD = {
    "a thousand times larger": 1000 * draw(12, 40),
    "constant rows": draw(12, 1).expand(12, 40).contiguous(),
    "all equal": torch.full((6, 40), 3.0),
    "single row": draw(1, 40),
    "single row, a thousand times larger": 1000 * draw(1, 40),
    "single column": 1000 * draw(12, 1),
    "outlier rows": outlier_rows(),
    "far below zero": draw(12, 40) - 5000,
}


@each_backend("sinkhorn")
@pytest.mark.parametrize("what", HARD)
def test_finite_and_right_at_the_extremes(backend, device, what):
    logits = HARD[what].to(device)
    want = reference.sinkhorn_knopp(logits.double(), temperature=1.0, iterations=3)
    with use_backend(sinkhorn=backend):
        for temperature in (1.0, 0.06):
            have = sinkhorn_knopp(logits, temperature=temperature)
            row, column, entropy, _ = sinkhorn_potentials(logits, temperature=temperature, statistics=True)
            assert all(x.isfinite().all() for x in (have, row, column, entropy))
            assert (have >= 0).all() and (have.sum(1) <= 1 + 1e-5).all()
            assert (row < 3 * 18.43).all(), "the 1e-8 bounds what a round adds"
        have = sinkhorn_knopp(logits, temperature=1.0)
    # the rounding of a score of 5,000 is 2e-4, and the row's sum tells of none that is common to the row
    torch.testing.assert_close(have.double(), want, rtol=2e-3 if logits.abs().max() > 100 else 2e-5, atol=1e-9)


@each_backend("sinkhorn", "cpu", "reference")
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_finite_where_rounding_is_larger_than_every_exponent(backend, device, scale):
    """Scores of 1e10 to 1e30: what two of them differ by, or a score from its own column's peak, is rounding."""
    logits = draw(72, 1003)
    with use_backend(sinkhorn=backend):
        for temperature in (1e-10, 1e-20, 1e-30):
            options = {"temperature": temperature, "scale": scale}
            row, column, entropy, first = sinkhorn_potentials(logits, statistics=True, **options)
            out = sinkhorn_knopp(logits, **options)
            assert all(x.isfinite().all() for x in (row, column, entropy, out))
            assert (out >= 0).all() and (out.sum(1) <= 1 + 1e-5).all() and (first < 1003).all()


@each_backend("sinkhorn", "cpu", "reference")
def test_more_rounds_than_the_formula_can_hold(backend, device):
    """A row that the exponential domain loses to underflow comes back here, as in fp64, 18.4 a round."""
    logits = draw(12, 40, seed=3)
    logits[4] -= 140.0
    want = reference.sinkhorn_knopp(logits.double(), temperature=1.0, iterations=10)
    assert want[4].sum() > 0.9 and not reference.sinkhorn_knopp(logits, temperature=1.0, iterations=10)[4].any()
    with use_backend(sinkhorn=backend):
        row, column = sinkhorn_potentials(logits, temperature=1.0, iterations=10)
    torch.testing.assert_close(
        SinkhornTargets(row, column, 1.0, logits).assignments().double(), want, rtol=1e-4, atol=1e-9
    )


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(1, 30), seed=st.integers(0, 10), scale=st.sampled_from([0.5, 1.0]))
def test_marginals(rows, columns, seed, scale):
    logits = draw(rows, columns, seed=seed)
    targets = sinkhorn_knopp(logits, temperature=1.0, scale=scale)
    torch.testing.assert_close(targets.sum(1), torch.ones(rows), rtol=1e-4, atol=1e-4)
    assert (targets >= 0).all()
    if scale == 1.0:  # more rounds bring the columns to equal shares as well
        many = sinkhorn_knopp(logits, temperature=1.0, iterations=300)
        torch.testing.assert_close(many.sum(0), torch.full((columns,), rows / columns), rtol=1e-2, atol=1e-3)


@each_backend("sinkhorn", "cpu", "reference")
def test_a_nan_does_not_disappear(backend, device):
    logits = draw(6, 40)
    logits[2, 35] = float("nan")
    with use_backend(sinkhorn=backend):
        row, column = sinkhorn_potentials(logits)
        assert sinkhorn_knopp(logits).isnan().all()
    assert row.isnan().all() and column.isnan().all(), "through its column it reaches every row, and so every column"


@use_backend(sinkhorn="cpu")
def test_the_same_every_time_and_with_any_number_of_threads():
    logits = draw(67, 3001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # more than there may be cores
        first, again = (sinkhorn_potentials(logits, temperature=1.0, statistics=True) for _ in range(2))
        torch.set_num_threads(1)
        other = sinkhorn_potentials(logits, temperature=1.0, statistics=True)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2e-6, atol=2e-5)


@each_backend("sinkhorn", "triton")
@pytest.mark.parametrize("held", [True, False], ids=["rows held", "rows in slices"])
def test_triton_in_several_tiles(backend, device, held):
    """Parts, programs and slices that divide neither 19 rows nor 90 columns: right, and the same every time."""
    from stellar_fast.kernels.sinkhorn.config import Columns, Config, Slices, Whole
    from stellar_fast.kernels.sinkhorn.kernel import launch_sinkhorn_fwd

    logits = torch.cat([draw(19, 90, seed=1), draw(19, 90)], 1).to(device)[:, :90]  # strided rows
    config = Config(Columns(4, 32, 1, 3), Whole(128, 1, 4) if held else None, Slices(32, 1))
    want = reference.sinkhorn_potentials(logits.double(), 1.0, statistics=True)
    exact = reference.sinkhorn_knopp(logits, 1.0)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            runs.append(launch_sinkhorn_fwd(logits, 1.0, 3, 1.0, True, True, config))
            potentials = launch_sinkhorn_fwd(logits, 1.0, 3, 1.0, True, False, config)
    row, column, out, entropy, first = runs[0]
    assert_as_asked(out, exact)
    assert_as_asked(potentials[2], exact)
    for have, expected in zip((row, column, entropy), want, strict=False):
        torch.testing.assert_close(have.double(), expected, rtol=1e-5, atol=2e-5)
    assert (first == want[3]).all() and potentials[3].shape == potentials[4].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_configs_are_valid():
    from stellar_fast.kernels.sinkhorn import config

    for shape in ({"R": 1, "C": 1}, *SPEC.shapes.values()):
        for dtype in SPEC.dtypes:
            found = list(config.candidates(shape, dtype))
            assert found[0] == config.heuristic(shape, dtype, "sm_90") and len(found) == len(set(found))
            assert (found[0].whole is None) == (shape["C"] > config.WIDEST_WHOLE)


def test_targets_from_features():
    features, prototypes = draw(7, 5), draw(11, 5, seed=1)
    logits = features @ prototypes.T
    row, column = sinkhorn_potentials(logits)
    want = sinkhorn_knopp(logits)
    torch.testing.assert_close(SinkhornTargets(row, column, 0.06, logits).assignments(), want, rtol=1e-4, atol=1e-9)
    lazy = SinkhornTargets(row, column, 0.06, features=features.requires_grad_(), prototypes=prototypes).assignments()
    torch.testing.assert_close(lazy, want, rtol=1e-4, atol=1e-9)
    assert not lazy.requires_grad


def test_fp64_stays_fp64():
    logits = draw(6, 20).double()
    row, column, entropy, _ = sinkhorn_potentials(logits, statistics=True)
    assert row.dtype == column.dtype == entropy.dtype == sinkhorn_knopp(logits).dtype == torch.float64
    torch.testing.assert_close(
        SinkhornTargets(row, column, 0.06, logits).assignments(), sinkhorn_knopp(logits), rtol=1e-11, atol=1e-15
    )


def test_no_gradient_and_wrong_input():
    logits = torch.randn(4, 8, requires_grad=True)
    assert not sinkhorn_knopp(logits).requires_grad
    assert not any(x.requires_grad for x in sinkhorn_potentials(logits, statistics=True))
    for function in (sinkhorn_knopp, sinkhorn_potentials):
        with pytest.raises(ValueError, match=r"logits must have 2 dimensions \(RC\) but its shape is \(2, 2, 2\)"):
            function(torch.zeros(2, 2, 2))
        with pytest.raises(ValueError, match="iterations must be positive but is 0"):
            function(logits, iterations=0)
        with pytest.raises(ValueError, match="temperature must be positive but is -1"):
            function(logits, temperature=-1.0)
        with pytest.raises(ValueError, match=r"logits must be floating point but is torch\.int64"):
            function(torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match="logits has 0 rows"):
            function(torch.zeros(0, 2))
        with pytest.raises(ValueError, match="logits has 0 columns"):
            function(torch.zeros(2, 0))


@each_backend("sinkhorn", "cpu", "triton")
def test_stages_are_registered(backend, device):
    logits, row, column = draw(6, 20).to(device), draw(6).to(device), draw(20).to(device)
    ops = torch.ops.stellar_fast
    torch.library.opcheck(ops.sinkhorn_columns.default, (logits, 0.06, backend))
    for last in (False, True):
        torch.library.opcheck(ops.sinkhorn_rows.default, (logits, 0.06, row, column, last, True, True, backend))


def joined_rows(rank: int, logits: Tensor, temperature: float) -> None:
    group = torch.distributed.group.WORLD
    mine = logits.split([5, 11])[rank]  # ranks need not have as many rows
    for name in ("cpu", "reference"):
        with use_backend(sinkhorn=name):
            for scale in (1.0, 0.7):
                options = {"temperature": temperature, "scale": scale}
                row, column, entropy, first = sinkhorn_potentials(logits, statistics=True, **options)
                want = row.split([5, 11])[rank], column, entropy.split([5, 11])[rank]
                *have, chosen = sinkhorn_potentials(mine, group=group, statistics=True, **options)
                torch.testing.assert_close(have, list(want), rtol=2e-6, atol=1e-5)
                assert torch.equal(chosen, first.split([5, 11])[rank])
                assignments = sinkhorn_knopp(logits, **options).split([5, 11])[rank]
                found = sinkhorn_knopp(mine, group=group, **options)
                torch.testing.assert_close(found, assignments, rtol=2e-5, atol=1e-9)


def test_two_ranks_give_what_one_gives_on_the_joined_rows(tmp_path):
    """The second rank's logits are 30 higher in half of the columns: a column's peak is not the rank's own."""
    logits = draw(16, 20)
    logits[5:, ::2] += 30.0
    run_two_ranks(joined_rows, tmp_path, logits, 1.0)


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e4])
def test_scores_of_any_size_are_assigned_as_in_fp64(factor: float) -> None:
    """With ties within a thousandth of a column's largest, which roundings of large scores would break."""
    logits = factor * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    logits[1] = logits[0] + 1e-4
    exact = sinkhorn_knopp(logits.double())
    with use_backend(sinkhorn="cpu"):
        torch.testing.assert_close(sinkhorn_knopp(logits).double(), exact, rtol=0, atol=1e-5)
        _, column, entropy, first = sinkhorn_potentials(logits, statistics=True)
    torch.testing.assert_close(exact.gather(1, first[:, None])[:, 0], exact.amax(1), rtol=1e-4, atol=0)  # ties are many
    torch.testing.assert_close(entropy.double(), torch.special.entr(exact).sum(1), rtol=1e-4, atol=1e-4)
    assert (near_their_peaks(logits, column) is None) == (factor == 1.0)
