"""prototype_cross_entropy by every backend, against an own formula in fp64 and torch's own losses."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stellar_fast import backend as backends
from stellar_fast.backend import OPS, observe, use_backend
from stellar_fast.kernels.prototype_cross_entropy import reference
from stellar_fast.kernels.prototype_cross_entropy.spec import SPEC
from stellar_fast.ops import prototype_cross_entropy
from stellar_fast.ops.prototype_cross_entropy import _multiplies_bf16, _on_cpu
from stellar_fast.ops.sinkhorn import SinkhornTargets
from stellar_fast.registry import OpSpec
from tests.conftest import mismatches
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory
from tests.roundings import assert_alike

OP = "prototype_cross_entropy"
ON_CPU = [name for name in OPS[OP] if name != "triton"]
FP32, BF16 = torch.float32, torch.bfloat16


def inputs(dtype: torch.dtype = FP32, seed: int = 0, **shape: int) -> dict:
    sizes = SPEC.shapes["small"] | shape
    return SPEC.make_inputs(sizes, dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))


def exact(features: Tensor, prototypes: Tensor, target: Tensor, index: Tensor | None, temperature: float) -> Tensor:
    """The formula in fp64 from a (T, C) matrix of targets."""
    x = features.double() @ prototypes.double().T / temperature
    log_p = x - torch.logsumexp(x, dim=1, keepdim=True)
    target = target.double() if index is None else target.double()[index]
    return -(target * log_p).sum(1).mean()


def spec_with(targets: str, width: int = 12) -> OpSpec:
    """The spec with targets by their features of that width, or as classes."""

    def make_inputs(shape, dtype, device, generator):
        given = SPEC.make_inputs(shape, dtype, device, generator)
        T, C = given["targets"].logits.shape
        if targets == "classes":
            return given | {"targets": torch.randint(0, C, (T,), generator=generator).to(device)}
        features = F.normalize(torch.randn(T, width, generator=generator, dtype=torch.float64), dim=-1)
        prototypes = torch.randn(C, width, generator=generator, dtype=torch.float64)
        row = -(features @ prototypes.T / 0.06).logsumexp(1)
        soft = given["targets"]._replace(logits=None, features=features.to(device, dtype), row=row.float().to(device))
        return given | {"targets": soft._replace(prototypes=prototypes.to(device, dtype))}

    return dataclasses.replace(SPEC, make_inputs=make_inputs)


@each_backend(OP)
@each_dtype(OP)
@each_shape(OP)
def test_no_worse_than_eager(backend, device, dtype, shape):
    check_op(OP, backend, shape, dtype, device)


@each_backend(OP, "cpu")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_several_blocks_of_predictions(backend, device, dtype):
    check_op(OP, backend, {"R": 1100, "T": 40, "C": 2500, "E": 24}, dtype, device, layouts=("contiguous",))


@each_backend(OP)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["features", "classes"])
def test_other_targets(backend, device, dtype, targets):
    shape = {"R": 9, "T": 5, "C": 37, "E": 16}
    if dtype == BF16 and targets == "features" and backend == "cpu":
        # the targets' logits are rounded as a bf16 product is: held against eager's product of the same dtype
        spec = dataclasses.replace(spec_with(targets), reference=_rounded_targets, eager=None)
        check_op(spec, backend, shape, dtype, device)
    else:
        check_op(spec_with(targets), backend, shape, dtype, device)


def _rounded_targets(features, prototypes, targets, index=None, temperature=0.12):
    logits = (targets.features.bfloat16() @ targets.prototypes.bfloat16().T).to(features.dtype)
    soft = SinkhornTargets(targets.row, targets.column, targets.temperature, logits)
    return reference.prototype_cross_entropy(features, prototypes, soft, index, temperature)


@each_backend(OP)
@pytest.mark.parametrize("changed", [{"temperature": 1.0}, {"index": torch.zeros(6, dtype=torch.int64)}], ids=str)
def test_other_arguments(backend, device, changed):
    changed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in changed.items()}
    check_op(OP, backend, device=device, **changed)


@each_backend(OP)
def test_without_an_index_row_learns_row(backend, device):
    given = inputs(R=5, T=5)
    given = {name: value for name, value in given.items() if name != "index"}
    check_op(dataclasses.replace(SPEC, make_inputs=lambda *_: _to(given, device)), backend, device=device)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)], ids=str)
def test_each_run_has_a_mean_of_its_own(backend, device, dtype, sizes):
    """Runs of rows learn as if each were called alone, whatever the gradients of their losses."""
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _to(inputs(dtype), device).items()}
    rows = [given.pop(name) for name in ("features", "index")]
    for factors in ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, -2.0, 0.0]):
        found = []
        for together in (True, False):
            features, prototypes = rows[0].clone().requires_grad_(), given["prototypes"].clone().requires_grad_()
            options = {"prototypes": prototypes, "targets": given["targets"]}
            with use_backend(prototype_cross_entropy=backend), observe() as seen:
                if together:
                    losses = prototype_cross_entropy(features, index=rows[1], split_sizes=sizes, **options)
                else:
                    runs = zip(features.split(sizes), rows[1].split(sizes), strict=True)
                    losses = torch.stack([prototype_cross_entropy(x, index=i, **options) for x, i in runs])
                sum(f * loss for f, loss in zip(factors, losses, strict=False)).backward()
            assert (OP, backend) in seen or backend == "reference"
            found.append({"losses": losses.detach(), "features": features.grad, "prototypes": prototypes.grad})
        tolerance = 1e-5 if dtype == FP32 else 2e-2
        assert found[0]["losses"].shape == (len(sizes),)
        for name, want in found[1].items():
            torch.testing.assert_close(found[0][name], want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@each_backend(OP)
def test_registration(backend, device):
    check_registered(OP, backend, device=device)


def _to(given: dict, device: str) -> dict:
    def move(x):
        return x.to(device) if isinstance(x, Tensor) else x

    return {n: SinkhornTargets(*map(move, x)) if isinstance(x, SinkhornTargets) else move(x) for n, x in given.items()}


@pytest.mark.parametrize("backend", ON_CPU)
def test_sums_of_targets_are_kept(backend):
    given = inputs(R=30, T=4, C=200)
    soft = given["targets"]._replace(row=given["targets"].row + torch.tensor([0.7, -3.0, 0.0, 1.5]))
    assert (soft.assignments().sum(1) - 1).abs().max() > 0.9
    with backends.use_backend(prototype_cross_entropy=backend):
        loss = prototype_cross_entropy(**given | {"targets": soft})
    want = exact(given["features"], given["prototypes"], soft.assignments(), given["index"], 0.12)
    assert mismatches({"loss": loss}, {"loss": want}) == []


@pytest.mark.parametrize("backend", ON_CPU)
def test_classes_are_torchs_cross_entropy(backend):
    given = inputs(R=40, T=40, C=300)
    classes = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
    doubles = [given[name].double().requires_grad_() for name in ("features", "prototypes")]
    want = F.cross_entropy(doubles[0] @ doubles[1].T / 0.12, classes)
    want.backward()
    leaves = [given[name].requires_grad_() for name in ("features", "prototypes")]
    with backends.use_backend(prototype_cross_entropy=backend):
        loss = prototype_cross_entropy(*leaves, classes)
    loss.backward()
    have = {"loss": loss, "features": leaves[0].grad, "prototypes": leaves[1].grad}
    assert mismatches(have, {"loss": want, "features": doubles[0].grad, "prototypes": doubles[1].grad}) == []


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_gradient_reaches_the_targets(backend):
    given = inputs()
    given["targets"] = SinkhornTargets(*[x.requires_grad_() if isinstance(x, Tensor) else x for x in given["targets"]])
    with backends.use_backend(prototype_cross_entropy=backend):
        assert not prototype_cross_entropy(**given).requires_grad
        given["features"].requires_grad_()
        prototype_cross_entropy(**given).backward()
    assert given["features"].grad is not None and given["prototypes"].grad is None
    assert all(x.grad is None for x in given["targets"] if isinstance(x, Tensor))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dominating", [False, True])
def test_many_prototypes(dtype, dominating):
    """C = 65,536; where one dominates, its probability is one but for what fp32 cannot tell."""
    given = inputs(dtype, R=5, T=3, C=65536, E=64)
    if dominating:
        given["features"][:3] = F.normalize(given["prototypes"][7].float(), dim=0).to(dtype)
        given["prototypes"][7] *= 4
        given["targets"].logits[0, 7] += 2
        soft = given["targets"]
        powers = soft.logits.double() / soft.temperature + soft.column
        given["targets"] = soft._replace(row=-powers.logsumexp(1).float())
    check_op(
        dataclasses.replace(SPEC, make_inputs=lambda *_: given),
        "cpu",
        SPEC.shapes["b16"],
        dtype,
        layouts=("contiguous",),
    )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_extreme_logits_stay_finite(backend, dtype):
    given = inputs(dtype, R=20, T=4, C=150)
    given["prototypes"] = 1000 * given["prototypes"]
    leaves = {name: given[name].requires_grad_() for name in ("features", "prototypes")}
    with backends.use_backend(prototype_cross_entropy=backend):
        loss = prototype_cross_entropy(**given | leaves)
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in leaves.values())
    want = exact(leaves["features"], leaves["prototypes"], given["targets"].assignments(), given["index"], 0.12)
    assert abs(loss.item() / want.item() - 1) < (1e-5 if dtype == FP32 else 1e-2)


@pytest.mark.parametrize("backend", ON_CPU)
def test_nan_shows(backend):
    given = inputs()
    given["features"][2, 3] = float("nan")
    with backends.use_backend(prototype_cross_entropy=backend):
        assert prototype_cross_entropy(**given).isnan()


class _Sizes(TorchDispatchMode):
    """The largest number of elements of what any operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("targets", ["logits", "features", "classes"])
def test_nothing_has_the_size_of_all_logits(targets):
    R, T, C, E = 2048, 64, 8192, 16
    given = inputs(R=R, T=T, C=C, E=E)
    soft = given["targets"]
    parts = {
        "logits": [soft.row, soft.column, soft.logits],
        "features": [soft.row, soft.column, given["features"][:T], given["prototypes"]],
        "classes": [given["index"][:T]],
    }[targets]
    arguments = (given["features"], given["prototypes"], parts, soft.temperature, given["index"], 0.12, FP32)
    with _Sizes() as sizes:
        _on_cpu(*arguments, torch.ones(len(given["features"])), [True, True])
    assert C * E <= sizes.largest <= R * C // 4


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_every_time_and_by_any_number_of_threads(threads):
    given = inputs(R=300, T=20, C=700)

    def results() -> list[Tensor]:
        leaves = {name: given[name].clone().requires_grad_() for name in ("features", "prototypes")}
        with backends.use_backend(prototype_cross_entropy="cpu"), poisoned_memory():
            loss = prototype_cross_entropy(**given | leaves)
            return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = results(), results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, results(), strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize("backend", ON_CPU)
def test_under_autocast_products_are_in_its_dtype(backend):
    """Or in fp32, where the processor multiplies no bf16."""
    dtype = BF16 if backend == "reference" or _multiplies_bf16() else FP32
    given = inputs(R=50, T=6, C=300)
    leaves = {name: given[name].requires_grad_() for name in ("features", "prototypes")}
    with backends.use_backend(prototype_cross_entropy=backend):
        with torch.autocast("cpu", BF16):
            loss = prototype_cross_entropy(**given | leaves)
        assert loss.dtype == FP32
        grads = torch.autograd.grad(loss, list(leaves.values()))
        rounded = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
        want = prototype_cross_entropy(**given | rounded)
        expected = torch.autograd.grad(want, list(rounded.values()))
    assert torch.equal(loss, want)
    for have, wanted in zip(grads, expected, strict=True):
        assert have.dtype == FP32
        assert_alike(have.to(dtype), wanted)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "without"])
def test_autocast_leaves_the_targets_alone(monkeypatch, backend, dtype, onednn):
    """Their logits are the same whether they are given or multiplied again: a rounded product would show."""
    shape = {"R": 50, "T": 6, "C": 300, "E": 16}
    given = spec_with("features").make_inputs(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    given |= {name: given[name].float() for name in ("features", "prototypes")}
    soft = given["targets"]
    logits = (soft.features.double() @ soft.prototypes.double().T).float()
    matrix = soft._replace(logits=logits, features=None, prototypes=None)
    rounded = soft._replace(features=soft.features.bfloat16(), prototypes=soft.prototypes.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    with backends.use_backend(prototype_cross_entropy=backend), torch.autocast("cpu", BF16):
        again, want, wrong = (prototype_cross_entropy(**given | {"targets": x}) for x in (soft, matrix, rounded))
    assert_alike(again, want)
    assert (wrong - want).abs() > 100 * (again - want).abs()


def test_bf16_without_onednn(monkeypatch):
    """A torch that was built without it multiplies in fp32."""
    given = inputs(BF16, R=30, T=4, C=200)

    def results(given: dict) -> list[Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in ("features", "prototypes")}
        with backends.use_backend(prototype_cross_entropy="cpu"):
            loss = prototype_cross_entropy(**given | leaves)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    def absent() -> bool:
        raise AttributeError("_is_mkldnn_bf16_supported")

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", absent)
    found = results(given)
    want = results(given | {name: given[name].float() for name in ("features", "prototypes")})
    assert [x.dtype for x in found] == [FP32, BF16, BF16]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("backend", ON_CPU)
def test_dtypes_of_targets_may_differ(backend):
    given = spec_with("features").make_inputs(
        {"R": 9, "T": 5, "C": 37, "E": 16}, FP32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    soft = given["targets"]
    mixed = soft._replace(features=soft.features.bfloat16(), row=soft.row.double())
    want = exact(given["features"], given["prototypes"], mixed.assignments(), given["index"], 0.12)
    with backends.use_backend(prototype_cross_entropy=backend):
        loss = prototype_cross_entropy(**given | {"targets": mixed})
        assert loss.dtype == FP32
        logits = soft._replace(logits=soft.assignments().log().half(), row=0 * soft.row, column=0 * soft.column)
        logits = logits._replace(temperature=1.0, features=None, prototypes=None)
        half = prototype_cross_entropy(**given | {"targets": logits})
    assert mismatches({"loss": loss}, {"loss": want}) == []
    want = exact(given["features"], given["prototypes"], logits.assignments(), given["index"], 0.12)
    assert mismatches({"loss": half}, {"loss": want}) == []


@pytest.mark.parametrize("backend", ON_CPU)
def test_twice_backward_through_one_loss(backend):
    given = inputs()
    features = given["features"].requires_grad_()
    with backends.use_backend(prototype_cross_entropy=backend):
        loss = prototype_cross_entropy(**given)
    (first,) = torch.autograd.grad(loss, features, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, features)
    assert_alike(twice, 2 * first)


def test_fp64_is_the_references_and_forward_mode_exact():
    given = inputs(torch.float64)
    with backends.observe() as seen:
        loss = prototype_cross_entropy(**given)
    assert loss.dtype == torch.float64 and not seen
    with (
        backends.use_backend(prototype_cross_entropy="cpu"),
        pytest.raises(ValueError, match=r"compute in torch\.float64"),
    ):
        prototype_cross_entropy(**given)
    given = inputs()
    tangent = torch.randn(given["features"].shape, generator=torch.Generator().manual_seed(3))

    def tangent_of() -> Tensor:
        return torch.func.jvp(
            lambda x: prototype_cross_entropy(**given | {"features": x}), (given["features"],), (tangent,)
        )[1]

    ours = tangent_of()
    with backends.use_backend("reference"):
        assert torch.equal(ours, tangent_of()) and ours != 0


def test_golden_head(golden_ops):
    logits = golden_ops["head_eps.logits"].flatten(0, 1)
    assigned = golden_ops["head_eps.assignments"].flatten(0, 1)
    losses, (T, C) = {}, assigned.shape
    soft = SinkhornTargets(torch.zeros(T), torch.zeros(C), 1.0, assigned.log())
    for backend in ON_CPU:
        with backends.use_backend(prototype_cross_entropy=backend):
            losses[backend] = prototype_cross_entropy(logits, torch.eye(C), soft)
    assert mismatches(losses, dict.fromkeys(losses, golden_ops["head_eps.loss"])) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(0, 16), "index": torch.zeros(0, dtype=torch.int64)}, "features has 0 rows"),
        ({"features": torch.zeros(6, 15)}, "prototypes has E=16 but features has E=15"),
        ({"prototypes": torch.zeros(36, 16)}, "targets.column has C=37 but prototypes has C=36"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, "features has R=6 but index has R=5"),
        ({"index": torch.zeros(6, dtype=torch.int32)}, "index must be torch.int64 but is torch.int32"),
        ({"index": None}, "targets.row has R=4 but features has R=6"),
        ({"targets": torch.zeros(4)}, "SinkhornTargets or torch.int64 classes but is torch.float32"),
        ({"temperature": 0.0}, "temperature must be positive but is 0.0"),
        ({"split_sizes": (4, 1)}, r"must be positive and 6 in all, as features has rows, but are \[4, 1\]"),
        ({"split_sizes": (6, 0)}, r"but are \[6, 0\]"),
        ({"features": torch.zeros(6, 16, dtype=torch.int64)}, "features must be floating point but is torch.int64"),
    ],
    ids=str,
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message), backends.use_backend(prototype_cross_entropy="cpu"):
        prototype_cross_entropy(**inputs() | change)


OUT_OF_RANGE = [
    ({"index": torch.tensor([0, 1, 4, 0, 0, 0])}, "index must be 0 to 3 but holds 4"),
    ({"index": torch.tensor([0, 1, -1, 0, 0, 0])}, "index must be 0 to 3 but holds -1"),
    ({"targets": torch.tensor([0, 37, 0, 0])}, "targets must be 0 to 36 but holds 37"),
    ({"targets": torch.tensor([0, -100, 0, 0])}, "targets must be 0 to 36 but holds -100"),
]


@each_backend(OP)
@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE, ids=str)
def test_values_out_of_range_are_named(monkeypatch, backend, device, change, message):
    monkeypatch.setenv("STELLAR_FAST_CHECK", "1")
    with pytest.raises(ValueError, match=message), backends.use_backend(prototype_cross_entropy=backend):
        prototype_cross_entropy(**_to(inputs() | change, device))


@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE, ids=str)
def test_values_are_checked_in_a_compiled_call(change, message):
    torch._dynamo.reset()
    compiled = torch.compile(prototype_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=message), backends.use_backend(prototype_cross_entropy="cpu"):
        compiled(**inputs() | change)
    torch._dynamo.reset()


@each_backend(OP, "triton")
@pytest.mark.parametrize(("E", "D", "dtype"), [(16, 64, FP32), (16, 40, BF16), (64, 300, BF16)], ids=str)
def test_triton_targets_wider_than_predictions(backend, device, E, D, dtype):
    check_op(spec_with("features", D), backend, {"R": 9, "T": 5, "C": 37, "E": E}, dtype, device)


@each_backend(OP, "triton")
@pytest.mark.parametrize("targets", [FP32, torch.float64], ids=["float32", "float64"])
def test_triton_targets_in_a_wider_dtype(backend, device, targets):
    """Tiles are those of the wider dtype: two matrices of each have to fit into shared memory."""

    def make_inputs(shape, dtype, device, generator):
        given = spec_with("features", 24).make_inputs(shape, targets, device, generator)
        return given | {name: given[name].to(dtype) for name in ("features", "prototypes")}

    spec = dataclasses.replace(SPEC, make_inputs=make_inputs)
    check_op(spec, backend, {"R": 9, "T": 5, "C": 37, "E": 24}, BF16, device)


@pytest.mark.parametrize("E", [1, 16, 24, 64, 256, 500])
@pytest.mark.parametrize("D", [None, 1, 40, 64, 256, 300, 700])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_the_heuristic_is_valid(E, D, dtype):
    from stellar_fast.kernels.common.tiles import dot_size
    from stellar_fast.kernels.prototype_cross_entropy.config import heuristic, is_valid

    shape = {"R": 1024, "C": 16384, "E": E} | ({} if D is None else {"D": D})
    config = heuristic(shape, dtype, "cuda")
    assert is_valid(config, shape, dtype)
    for name in ("features", "prototypes"):
        tile = getattr(config, name)
        for block_out in (2 * dot_size(E), dot_size(E) // 2 if tile.slice_e >= E else 8):
            wrong = dataclasses.replace(config, **{name: dataclasses.replace(tile, block_out=block_out)})
            assert not is_valid(wrong, shape, dtype)


@each_backend(OP, "triton")
@pytest.mark.parametrize("targets", ["logits", "features", "classes"])
@pytest.mark.parametrize("width", [16, 32], ids=["slices", "whole"])
def test_triton_sums_over_tiles_and_splits(backend, device, targets, width):
    """Small tiles: C in 3 splits of 2 tiles, R in 2 splits, E in slices or whole; the same result every time."""
    from stellar_fast.kernels.prototype_cross_entropy.config import Config, Tile
    from stellar_fast.kernels.prototype_cross_entropy.kernel import (
        launch_prototype_cross_entropy_bwd,
        launch_prototype_cross_entropy_fwd,
    )

    tile = Tile(block_r=16, block_c=16, slice_e=width, block_out=width, num_warps=4, num_stages=1)
    config = Config(tile, tile, tile, forward_splits=3, features_splits=3, prototypes_splits=2)
    spec = SPEC if targets == "logits" else spec_with(targets)
    shape = {"R": 35, "T": 6, "C": 90, "E": 24}
    given = spec.make_inputs(shape, FP32, torch.device("cpu"), torch.Generator().manual_seed(0))
    doubles = [given[name].double().requires_grad_() for name in ("features", "prototypes")]
    dense = reference.dense_targets(given["targets"], 90, torch.float64)
    want = exact(*doubles, dense, given["index"], 0.12)
    (3 * want).backward()
    expected = {"loss": want.detach(), "features": doubles[0].grad, "prototypes": doubles[1].grad}

    given = _to(given, device)
    soft = given["targets"]
    parts = [soft] if isinstance(soft, Tensor) else [x for x in soft if isinstance(x, Tensor)]
    pair, index = (given["features"], given["prototypes"]), given["index"]
    runs = []
    for _ in range(2):
        with poisoned_memory():
            losses, lse, mass = launch_prototype_cross_entropy_fwd(*pair, parts, 0.06, index, 0.12, config)
            grads = launch_prototype_cross_entropy_bwd(
                torch.full((35,), 3 / 35, device=device),
                *pair,
                parts,
                0.06,
                index,
                lse,
                mass,
                0.12,
                [True, True],
                config,
            )
        runs.append({name: x.cpu() for name, x in zip(expected, (losses.mean(), *grads), strict=True)})
    assert mismatches(runs[0], expected, absolute=1e-4) == []
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in expected)
