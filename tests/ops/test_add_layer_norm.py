import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.add_layer_norm.spec import SPEC
from stellar_fast.nn.add_layer_norm import AddLayerNorm
from stellar_fast.ops import add_layer_norm
from tests.conftest import mismatches
from tests.harness import check_op, check_registered, each_backend, each_shape, poisoned_memory
from tests.roundings import assert_alike

FP32, BF16 = torch.float32, torch.bfloat16
DTYPE = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])


def inputs(dtype: torch.dtype = FP32, R: int = 9, D: int = 40) -> dict[str, Tensor]:
    return SPEC.make_inputs({"R": R, "D": D}, dtype, torch.device("cpu"), torch.Generator().manual_seed(1))


@DTYPE
@each_backend("add_layer_norm")
@each_shape("add_layer_norm")
def test_no_worse_than_eager(backend, device, shape, dtype):
    check_op("add_layer_norm", backend, shape, dtype, device)


@DTYPE
@each_backend("add_layer_norm")
def test_without_a_residual(backend, device, dtype):
    check_op("add_layer_norm", backend, "small", dtype, device, residual=None)


@each_backend("add_layer_norm")
def test_registration(backend, device):
    check_registered("add_layer_norm", backend, device=device)


@each_backend("add_layer_norm", "cpu")
def test_registration_without_a_residual(backend, device):
    tensors = [t.to(device).requires_grad_() for t in inputs().values() if isinstance(t, Tensor)]
    x, _, weight, bias = tensors
    operator = torch.ops.stellar_fast.add_layer_norm.default
    torch.library.opcheck(operator, (x, None, weight, bias, 1e-6, torch.float32, backend))


@pytest.mark.parametrize("out", [FP32, BF16], ids=["to fp32", "to bf16"])
@pytest.mark.parametrize("x", [FP32, BF16], ids=["x fp32", "x bf16"])
@pytest.mark.parametrize("residual", [FP32, BF16, None], ids=["stream fp32", "stream bf16", "no stream"])
@pytest.mark.parametrize("weight", [FP32, BF16], ids=["weight fp32", "weight bf16"])
@each_backend("add_layer_norm", "cpu", "torch")
def test_mixed_dtypes(backend, device, x, residual, weight, out):
    dtypes = {"x": x, "residual": residual, "weight": weight, "bias": weight}
    shape = {"R": 33, "D": 72}
    given = {n: v.to(dtypes[n]) for n, v in inputs(**shape).items() if dtypes.get(n)}
    given |= {"eps": 1e-6, "dtype": out} | ({"residual": None} if residual is None else {})
    spec = dataclasses.replace(SPEC, make_inputs=lambda *_: given)
    check_op(spec, backend, shape, BF16, device, layouts=("contiguous", "sliced"))
    with use_backend(add_layer_norm=backend):
        total, normed = add_layer_norm(**given)
    assert total.dtype == (x if residual is None else torch.promote_types(x, residual)) and normed.dtype == out


def test_gradients_have_the_dtypes_of_their_tensors():
    tensors = {n: v.requires_grad_() for n, v in inputs().items() if n != "eps"}
    tensors["x"] = tensors["x"].detach().bfloat16().requires_grad_()
    with use_backend(add_layer_norm="cpu"):
        total, normed = add_layer_norm(**tensors, eps=1e-6, dtype=BF16)
    assert total.dtype == FP32 and normed.dtype == BF16
    grads = torch.autograd.grad((total, normed), list(tensors.values()), (total.detach(), normed.detach()))
    assert [g.dtype for g in grads] == [BF16, FP32, FP32, FP32]
    assert torch.equal(grads[0], grads[1].bfloat16())


@use_backend(add_layer_norm="cpu")
def test_more_dimensions_and_strided_rows():
    tensors = inputs(R=12)
    want = add_layer_norm(**tensors)
    wide = torch.cat([tensors["x"], tensors["residual"]], 1)  # both are halves of one tensor's rows
    tensors["x"], tensors["residual"] = wide[:, :40].unflatten(0, (3, 4)), wide[:, 40:].unflatten(0, (3, 4))
    for have, expected in zip(add_layer_norm(**tensors), want, strict=True):
        assert have.shape == (3, 4, 40)
        assert_alike(have.flatten(0, 1), expected)
    row = {"x": tensors["x"][0, 0], "residual": tensors["residual"][0, 0]}
    assert_alike(add_layer_norm(**tensors | row)[1], want[1][0])
    spread = {"x": wide[:1, :40].expand(12, 40)}  # rows of stride 0
    assert_alike(
        add_layer_norm(**tensors | spread | {"residual": None})[1][5:6],
        F.layer_norm(wide[:1, :40], (40,), tensors["weight"], tensors["bias"], tensors["eps"]),
    )


def test_without_a_residual_the_total_is_x_itself():
    tensors = inputs()
    assert add_layer_norm(**tensors | {"residual": None})[0] is tensors["x"]


@use_backend(add_layer_norm="cpu")
def test_the_sum_over_rows_is_the_same_every_time():
    tensors = {n: v.requires_grad_() for n, v in inputs(R=257).items() if n != "eps"}

    def gradients() -> list[Tensor]:
        total, normed = add_layer_norm(**tensors, eps=1e-6)
        return list(torch.autograd.grad((total.sum() + (normed**2).sum()), list(tensors.values())))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, again = gradients(), gradients()
        torch.set_num_threads(3)  # more than there may be cores
        other = gradients()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def test_large_mean_does_not_cancel():
    tensors = inputs() | {"residual": None}
    tensors["x"] = tensors["x"] + 1000
    exact = F.layer_norm(tensors["x"].double(), (40,), tensors["weight"].double(), tensors["bias"].double(), 1e-6)
    with use_backend(add_layer_norm="cpu"):
        assert (add_layer_norm(**tensors)[1] - exact).abs().max() < 1e-3


def test_forward_mode_is_not_silently_zero():
    tensors = inputs()
    direction = torch.ones_like(tensors["x"])
    _, (tangent, _) = torch.func.jvp(lambda x: add_layer_norm(**tensors | {"x": x}), (tensors["x"],), (direction,))
    assert torch.equal(tangent, direction)


def test_module_under_autocast_saves_the_cast():
    norm = AddLayerNorm(512, eps=1e-6)
    tensors = inputs(R=512, D=512)
    with torch.autocast("cpu", BF16), backend.observe() as seen:
        total, normed = norm(tensors["residual"], tensors["x"].bfloat16())
        norm(tensors["residual"][:9], tensors["x"][:9])
    assert seen == {("add_layer_norm", "cpu")}, "the large one ran here, the small one in torch"
    assert total.dtype == FP32 and normed.dtype == BF16
    assert_alike(total, tensors["residual"] + tensors["x"].bfloat16())
    assert_alike(normed, F.layer_norm(total, (512,), eps=1e-6).bfloat16())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.zeros(8, 40)}, r"x has shape \(9, 40\) but residual has \(8, 40\)"),
        ({"weight": torch.zeros(39)}, r"weight and bias must have shape \(40,\) but have \(39,\) and \(40,\)"),
        ({"x": torch.zeros(9, 40, dtype=torch.int64)}, "x must be floating point but is torch.int64"),
        ({"eps": 0.0}, "eps must be positive but is 0.0"),
        ({"x": torch.zeros(())}, "D must be positive but is 0"),
    ],
)
def test_wrong_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**inputs() | changed)


def test_fp64_is_refused_by_name():
    tensors = {n: v.double() if n != "eps" else v for n, v in inputs().items()}
    assert add_layer_norm(**tensors)[1].dtype == torch.float64
    with use_backend(add_layer_norm="cpu"), pytest.raises(ValueError, match=r"it does not compute in torch\.float64"):
        add_layer_norm(**tensors)


@each_backend("add_layer_norm", "triton")
@pytest.mark.parametrize("with_residual", [True, False])
def test_triton_rows_in_several_rounds(backend, device, with_residual):
    """3 programs for 9 pairs of strided rows: the sums over them are right, and the same every time."""
    from stellar_fast.kernels.add_layer_norm.config import Config, Tile
    from stellar_fast.kernels.add_layer_norm.kernel import launch_add_layer_norm_bwd, launch_add_layer_norm_fwd

    tensors = {n: v for n, v in inputs(R=17).items() if isinstance(v, Tensor)}
    if not with_residual:
        del tensors["residual"]
    doubles = {n: v.double().requires_grad_() for n, v in tensors.items()}
    total = doubles["x"] + doubles.get("residual", 0)
    normed = F.layer_norm(total, (40,), doubles["weight"], doubles["bias"], 1e-6)
    along, along_total = inputs(R=17)["x"].flip(0), inputs(R=17)["residual"].flip(1)
    ((normed * along).sum() + (total * along_total).sum()).backward()
    expected = {"total": total.detach(), "normed": normed.detach()}
    expected |= {n: v.grad for n, v in doubles.items() if n != "residual"}

    def strided(x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(0)], 1).to(device)[:, : x.shape[1]]

    x, weight, bias = strided(tensors["x"]), tensors["weight"].to(device), tensors["bias"].to(device)
    residual = strided(tensors["residual"]) if with_residual else None
    tile = Tile(block_r=2, num_warps=1)
    config = Config(tile, tile, programs=3)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            total, normed, mean, rstd = launch_add_layer_norm_fwd(x, residual, weight, bias, 1e-6, FP32, config)
            total = total if with_residual else x
            grads = (strided(along), strided(along_total), total, weight, mean, rstd)
            grad, grad_x, *sums = launch_add_layer_norm_bwd(*grads, FP32, config)
        assert grad_x.shape == (0,)
        runs.append(dict(zip(expected, (y.cpu() for y in (total, normed, grad, *sums)), strict=True)))
    assert mismatches(runs[0], expected) == []
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in expected)


@each_backend("add_layer_norm", "triton")
@pytest.mark.parametrize(
    ("x", "residual", "weight", "out"),
    [(BF16, FP32, FP32, BF16), (FP32, BF16, BF16, FP32), (BF16, None, FP32, torch.float16)],
    ids=["as_under_autocast", "the_other_way", "without_stream"],
)
def test_triton_mixed_dtypes(backend, device, x, residual, weight, out):
    dtypes = {"x": x, "residual": residual, "weight": weight, "bias": weight}
    given = {n: v.to(device, dtypes[n]) for n, v in inputs().items() if dtypes.get(n)}
    given |= {"eps": 1e-6, "dtype": out} | ({"residual": None} if residual is None else {})
    spec = dataclasses.replace(SPEC, make_inputs=lambda *_: given)
    check_op(spec, backend, "small", BF16, device, layouts=("contiguous", "sliced"))
