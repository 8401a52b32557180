from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.conv3x3.spec import SPEC
from stellar_fast.ops import conv3x3
from stellar_fast.ops.conv3x3 import pays
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape
from tests.roundings import assert_alike, assert_no_worse

channels_last = torch.channels_last


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: int) -> dict[str, Any]:
    shape = {"B": 2, "C": 6, "O": 8, "H": 5, "W": 6, "G": 0, "R": 0} | sizes
    return SPEC.make_inputs(shape, dtype, torch.device(device), torch.Generator().manual_seed(1))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


@each_backend("conv3x3")
@each_dtype("conv3x3")
@each_shape("conv3x3")
def test_no_worse_than_eager(backend, device, shape, dtype):
    if backend == "cpu" and dtype != torch.float32:
        with use_backend(conv3x3="cpu"), pytest.raises(ValueError, match=rf"does not compute in {dtype}"):
            check_op("conv3x3", backend, shape, dtype, device)
        return
    check_op("conv3x3", backend, shape, dtype, device)


@each_backend("conv3x3")
def test_registration(backend, device):
    check_registered("conv3x3", backend, device=device)


@each_backend("conv3x3")
def test_without_the_optional_arguments(backend, device):
    check_op("conv3x3", backend, device=device, bias=None, stats_groups=None)
    check_op("conv3x3", backend, device=device, residual=None)


@use_backend(conv3x3="cpu")
@pytest.mark.parametrize("channels", [64, 256])
def test_values_above_zero_are_no_worse(channels):
    """Their transforms cancel."""
    arguments = inputs(C=channels, O=32, H=12, W=12)
    arguments["x"] += 1
    assert_no_worse({"out": conv3x3(**arguments)}, lambda **given: {"out": plain(**given)}, **arguments)


@each_backend("conv3x3")
@pytest.mark.parametrize("height, width", [(1, 1), (2, 1), (3, 4), (1, 200), (67, 3), (40, 41)])
def test_values_of_whole_numbers(backend, device, height, width):
    """Sums of small whole numbers and their quarters have no rounding: a wrong tap or place shows at any tolerance."""
    generator = torch.Generator().manual_seed(0)

    def whole(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(device, torch.float32)

    arguments = {"x": whole(2, 5, height, width), "weight": whole(7, 5, 3, 3), "bias": whole(7)}
    arguments["residual"] = whole(2, 7, height, width)
    with use_backend(conv3x3=backend):
        out = conv3x3(**arguments)
    assert torch.equal(out, plain(**arguments))
    assert out.is_contiguous(memory_format=channels_last)


@each_backend("conv3x3")
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_statistics_are_those_of_the_stored_values(backend, device, groups):
    arguments = inputs(device=device, H=31, W=37, R=1)
    arguments["bias"] += 3
    with use_backend(conv3x3=backend):
        out, stats = conv3x3(**arguments, stats_groups=groups)
    assert stats.shape == (2, groups, 2) and stats.dtype == torch.float32 and not stats.requires_grad
    assert_no_worse({"stats": stats}, lambda out: {"stats": statistics(out, groups)}, out)


@use_backend(conv3x3="cpu")
def test_a_mean_far_above_the_deviation_keeps_the_variance():
    arguments = inputs(H=40, W=40)
    arguments["bias"] = 1000 + 0 * arguments["bias"]
    out, stats = conv3x3(**arguments, stats_groups=2)
    want = statistics(out.double(), 2)
    torch.testing.assert_close(stats.double(), want, rtol=1e-5, atol=0)
    assert 0.1 < want[..., 1].max() < 10


@use_backend(conv3x3="cpu")
def test_a_constant_image_has_no_variance():
    arguments = inputs()
    arguments |= {"weight": 0 * arguments["weight"], "bias": 0 * arguments["bias"] + 0.3}
    _, stats = conv3x3(**arguments, stats_groups=4)
    assert_alike(stats[..., 0], torch.full_like(stats[..., 0], 0.3))
    assert bool((stats[..., 1] == 0).all())


@use_backend(conv3x3="cpu")
@pytest.mark.parametrize("row, column", [(5, 5), (4, 5), (5, 4), (4, 4)])
def test_a_nan_reaches_its_neighbours_alone(row, column):
    arguments = inputs(H=12, W=12)
    arguments["x"][1, 2, row, column] = torch.nan
    out, stats = conv3x3(**arguments, stats_groups=2)
    assert torch.equal(out.isnan(), plain(**arguments).isnan())
    assert stats[1].isnan().all() and stats[0].isfinite().all()


@use_backend(conv3x3="cpu")
def test_any_number_of_threads_finds_the_same():
    arguments = inputs(B=3, O=20, H=39, W=33, R=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(conv3x3(**arguments, stats_groups=5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for some in found for a, b in zip(some, found[0], strict=True))


@each_backend("conv3x3")
@pytest.mark.parametrize("given", ["the residual", "other memory", "no residual"])
def test_in_memory_that_is_given(backend, device, given):
    arguments = inputs(device=device, H=31, W=33, R=int(given != "no residual"))
    want = plain(**arguments)
    out = arguments["residual"] if given == "the residual" else torch.empty_like(want).to(memory_format=channels_last)
    version = out._version
    with use_backend(conv3x3=backend):
        found, stats = conv3x3(**arguments, stats_groups=4, out=out)
    assert found is out and out._version > version
    assert_alike(out, want)
    assert_alike(stats, statistics(want, 4))


@use_backend(conv3x3="cpu")
def test_memory_that_cannot_be_given():
    arguments = inputs(O=6, R=1)
    x, residual = arguments["x"], arguments["residual"]
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        conv3x3(**arguments, out=x)
    memory = torch.zeros(3, 5, 6, 6).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out overlaps residual in memory"):
        conv3x3(**arguments | {"residual": memory[:2]}, out=memory[1:])
    with pytest.raises(ValueError, match=r"out must be torch\.float32 of shape \(2, 6, 5, 6\) in channels-last memory"):
        conv3x3(**arguments, out=torch.zeros(2, 6, 5, 6))
    with pytest.raises(ValueError, match="out is given but weight needs a gradient"):
        conv3x3(**arguments | {"weight": arguments["weight"].requires_grad_()}, out=residual)
    with torch.no_grad():
        conv3x3(**arguments, out=residual)


@use_backend(conv3x3="cpu")
def test_a_changed_weight_is_read_again():
    arguments = inputs()
    weight = torch.nn.Parameter(arguments.pop("weight"))
    for change in (lambda: None, lambda: weight.mul_(-3), lambda: setattr(weight, "data", weight.data.flip(0).clone())):
        with torch.no_grad():
            change()
        assert_alike(conv3x3(weight=weight, **arguments), plain(weight=weight, **arguments))


@use_backend(conv3x3="cpu")
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("residual",), ("x", "bias")])
def test_some_gradients(wanted):
    arguments = inputs(R=1)
    leaves = [arguments[name].requires_grad_() for name in wanted]
    along = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    out, _ = conv3x3(**arguments, stats_groups=2)
    found = torch.autograd.grad(out, leaves, along)
    for have, want in zip(found, torch.autograd.grad(plain(**arguments), leaves, along), strict=True):
        assert_alike(have, want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_computes_in_bf16_and_keeps_a_residual_in_fp32(backend):
    arguments = inputs(R=1)
    leaves = [value.requires_grad_() for value in arguments.values()]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            out = function(**arguments)
        assert out.dtype == torch.float32
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    with use_backend(conv3x3=backend):
        found = run(conv3x3)
    for have, want in zip(found, run(plain), strict=True):
        assert (have - want).norm() < 0.01 * want.norm()


def test_what_the_kernel_does_not_take():
    for dtype in (torch.float64, torch.bfloat16):
        arguments = inputs(dtype)
        with backend.observe() as seen:
            out = conv3x3(**arguments)
        assert not seen and out.dtype == dtype
        assert_alike(out, plain(**arguments))
    with torch.autocast("cpu", torch.bfloat16), use_backend(conv3x3="cpu"), pytest.raises(ValueError, match="bfloat16"):
        conv3x3(**inputs())


def test_the_kernel_is_taken_where_it_pays():
    arguments = inputs(B=1, C=128, O=64, H=32, W=32)
    few = inputs(B=1, C=3, O=64, H=32, W=32)
    learns = arguments | {"weight": arguments["weight"].clone().requires_grad_()}
    for given, want in ((arguments, {("conv3x3", "cpu")}), (few, set()), (learns, {("conv3x3", "cpu")})):
        assert pays(given["x"], given["weight"]) == bool(want)
        with backend.observe() as seen:
            out = conv3x3(**given)
        assert seen == want
        assert_alike(out, plain(**given))


def test_forward_mode_is_not_silently_zero():
    arguments = inputs(C=128, O=64, H=32, W=32)
    weight, along = arguments.pop("weight"), inputs(C=128, O=64)["weight"].flip(0)

    def loss(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: function(weight=w, **arguments).square().sum()

    found, want = (torch.func.jvp(loss(f), (weight,), (along,))[1] for f in (conv3x3, plain))
    assert want.abs() > 1
    assert_alike(found, want)


def test_wrong_input_is_named():
    x, weight, bias = torch.zeros(2, 4, 3, 3), torch.zeros(8, 4, 3, 3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions \(BCHW\) but its shape is \(4, 3, 3\)"):
        conv3x3(x[0], weight)
    with pytest.raises(ValueError, match="weight has C=5 but x has C=4"):
        conv3x3(x, torch.zeros(8, 5, 3, 3))
    with pytest.raises(ValueError, match=r"weight must be \(O, C, 3, 3\) but has shape \(8, 4, 1, 1\)"):
        conv3x3(x, torch.zeros(8, 4, 1, 1))
    with pytest.raises(ValueError, match="bias has O=7 but weight has O=8"):
        conv3x3(x, weight, bias[:7])
    with pytest.raises(ValueError, match="residual has W=4 but x has W=3"):
        conv3x3(x, weight, bias, residual=torch.zeros(2, 8, 3, 4))
    with pytest.raises(ValueError, match="stats_groups must divide the 8 output channels but is 3"):
        conv3x3(x, weight, bias, stats_groups=3)
    with pytest.raises(ValueError, match="stats_groups must divide the 8 output channels but is 0"):
        conv3x3(x, weight, bias, stats_groups=0)
    with pytest.raises(ValueError, match=r"must have one dtype but have torch\.bfloat16 and torch\.float32"):
        conv3x3(x, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match=r"x must be floating point but is torch\.int64"):
        conv3x3(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"x of shape \(2, 4, 0, 3\) and weight .* must not be empty"):
        conv3x3(x[:, :, :0], weight, bias)
