import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.upsample_conv2x import phases
from stellar_fast.kernels.upsample_conv2x.spec import SPEC
from stellar_fast.nn.upsample_conv2x import UpsampleConv2x
from stellar_fast.ops import upsample_conv2x
from stellar_fast.ops.from_weight import _made, from_weight
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape
from tests.roundings import assert_alike, assert_no_worse

OURS = ("cuda", "cpu")
door = importlib.import_module("stellar_fast.ops.upsample_conv2x")  # the package's attribute is the function


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    shape = {"B": 2, "C": 6, "O": 8, "H": 4, "W": 5, "G": 0} | sizes
    return SPEC.make_inputs(shape, dtype, torch.device(device), torch.Generator().manual_seed(1))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


@each_backend("upsample_conv2x")
@each_dtype("upsample_conv2x")
@each_shape("upsample_conv2x")
def test_no_worse_than_eager(backend, device, shape, dtype):
    if backend == "cpu" and dtype == torch.float16:
        with use_backend(upsample_conv2x="cpu"), pytest.raises(ValueError, match=r"does not compute in torch\.float16"):
            check_op("upsample_conv2x", backend, shape, dtype, device)
        return
    check_op("upsample_conv2x", backend, shape, dtype, device)


@each_backend("upsample_conv2x")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(backend, device, dtype):
    check_registered("upsample_conv2x", backend, dtype=dtype, device=device)


@each_backend("upsample_conv2x")
def test_without_bias_and_without_statistics(backend, device):
    check_op("upsample_conv2x", backend, device=device, bias=None)
    check_op("upsample_conv2x", backend, device=device, stats_groups=None)


@each_backend("upsample_conv2x")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 1), (3, 4), (1, 200), (67, 3)])
def test_values_of_whole_numbers(backend, device, height, width, dtype):
    """Sums of whole numbers below 256 have no rounding, so that a wrong tap or place shows whatever the tolerance."""
    generator = torch.Generator().manual_seed(0)

    def whole(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(device, dtype)

    arguments = {"x": whole(2, 5, height, width), "weight": whole(7, 5, 3, 3), "bias": whole(7)}
    with use_backend(upsample_conv2x=backend):
        out = upsample_conv2x(**arguments)
    assert torch.equal(out, plain(**arguments))
    assert out.is_contiguous(memory_format=torch.channels_last)


@each_backend("upsample_conv2x", *OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_statistics_are_those_of_the_stored_values(backend, device, dtype, groups):
    arguments = inputs(device, dtype, H=9, W=37)
    arguments["bias"] += 3
    with use_backend(upsample_conv2x=backend):
        out, stats = upsample_conv2x(**arguments, stats_groups=groups)
    assert stats.shape == (2, groups, 2) and stats.dtype == torch.float32 and not stats.requires_grad
    assert_no_worse({"stats": stats}, lambda out: {"stats": statistics(out, groups)}, out)


@each_backend("upsample_conv2x", *OURS)
def test_a_mean_far_above_the_deviation_keeps_the_variance(backend, device):
    arguments = inputs(device, H=40, W=40)
    arguments["bias"] = 1000 + 0 * arguments["bias"]
    with use_backend(upsample_conv2x=backend):
        out, stats = upsample_conv2x(**arguments, stats_groups=2)
    want = statistics(out.double(), 2)
    torch.testing.assert_close(stats.double(), want, rtol=1e-5, atol=0)
    assert 0.1 < want[..., 1].max() < 10


@each_backend("upsample_conv2x", *OURS)
def test_a_constant_image_has_no_variance(backend, device):
    arguments = inputs(device)
    arguments["weight"] = 0 * arguments["weight"]
    arguments["bias"] = 0 * arguments["bias"] + 0.3
    with use_backend(upsample_conv2x=backend):
        _, stats = upsample_conv2x(**arguments, stats_groups=4)
    assert_alike(stats[..., 0], torch.full_like(stats[..., 0], 0.3))
    assert bool((stats[..., 1] == 0).all())


@each_backend("upsample_conv2x", *OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_reaches_its_neighbours_alone(backend, device, dtype):
    arguments = inputs(device, dtype, B=2, H=6, W=6)
    arguments["x"][1, 2, 3, 3] = torch.nan
    with use_backend(upsample_conv2x=backend):
        out, stats = upsample_conv2x(**arguments, stats_groups=2)
    assert torch.equal(out.isnan(), plain(**arguments).isnan())
    assert out.isnan().sum() == 8 * 16
    assert stats[1].isnan().all() and stats[0].isfinite().all()


@use_backend(upsample_conv2x="cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_finds_the_same(dtype):
    arguments = inputs(dtype=dtype, B=3, O=20, H=19, W=33)
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(upsample_conv2x(**leaves, stats_groups=5))
            grad = torch.autograd.grad(upsample_conv2x(**leaves).sum(), leaves["bias"])
            found[-1] += grad
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for some in found for a, b in zip(some, found[0], strict=True))


@each_backend("upsample_conv2x", *OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_weight_is_read_again(backend, device, dtype):
    arguments = inputs(device, dtype)
    weight = torch.nn.Parameter(arguments.pop("weight"))

    def check() -> None:
        with use_backend(upsample_conv2x=backend):
            out = upsample_conv2x(weight=weight, **arguments)
        want = plain(weight=weight, **arguments)
        assert (out - want).float().norm() < (1e-5 if dtype == torch.float32 else 1e-2) * want.float().norm()

    check()
    with torch.no_grad():
        weight.mul_(-3)
    check()
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    check()
    weight.data = weight.data.flip(0).contiguous()
    check()
    with torch.inference_mode():
        weight.add_(1)
        check()
    check()


def test_a_weight_is_prepared_once_and_forgotten_with_it():
    arguments = inputs()
    weight = arguments["weight"]
    counted = []

    def make(weight: Tensor) -> Tensor:
        counted.append(weight.shape)
        return phases.phase_weights(weight)

    first = from_weight(make, weight, torch.float32)
    assert from_weight(make, weight, torch.float32) is first and len(counted) == 1
    from_weight(make, weight, torch.bfloat16)
    assert len(counted) == 2
    weight += 1
    assert from_weight(make, weight, torch.float32) is not first and len(counted) == 3
    with use_backend(upsample_conv2x="cpu"):
        upsample_conv2x(**arguments)
        entries = len(_made[weight.untyped_storage()])
        upsample_conv2x(**arguments)
    assert entries == len(_made[weight.untyped_storage()]) == 3
    gc.collect()
    gone, size = weakref.ref(first), len(_made)
    del first, weight
    arguments.clear()
    gc.collect()
    assert gone() is None and len(_made) == size - 1


@use_backend(upsample_conv2x="cpu")
def test_a_weight_that_learns_is_read_every_time():
    """Even where it is filled without a trace, as FSDP does."""
    arguments = inputs()
    weight = arguments["weight"].requires_grad_()
    for _ in range(2):
        assert_alike(upsample_conv2x(**arguments), plain(**arguments))
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight += 1
        assert_alike(upsample_conv2x(**arguments), plain(**arguments))


def test_loading_forgets_what_was_made():
    conv = UpsampleConv2x(6, 8).requires_grad_(False)
    x = torch.randn(1, 6, 4, 4)
    with use_backend(upsample_conv2x="cpu"):
        before = conv(x)
        loaded = {name: value + 1 for name, value in conv.state_dict().items()}
        conv.load_state_dict(loaded)
        with torch.autograd._unsafe_preserve_version_counter(conv.weight):
            conv.weight += 1
        conv.load_state_dict(conv.state_dict())
        assert_alike(conv(x), plain(x, conv.weight, conv.bias))
    assert not torch.equal(before, conv(x))


def test_an_inference_weight_is_read_every_time():
    with torch.inference_mode(), use_backend(upsample_conv2x="cpu"):
        arguments = inputs()
        for _ in range(2):
            assert_alike(upsample_conv2x(**arguments), plain(**arguments))
            arguments["weight"] *= -2


def test_phase_weights_fold_back():
    """The gradient of the taps goes back through the sums that made them."""
    weight = inputs()["weight"].double().requires_grad_()
    grad = torch.randn(4 * 8, 6, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (want,) = torch.autograd.grad(phases.phase_weights(weight), weight, grad)
    assert_alike(phases.fold_phases(grad), want)


@each_backend("upsample_conv2x", *OURS)
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")])
def test_some_gradients(backend, device, wanted):
    arguments = inputs(device)
    leaves = [arguments[name].requires_grad_() for name in wanted]
    along = torch.randn(2, 8, 8, 10, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend(upsample_conv2x=backend):
        out, _ = upsample_conv2x(**arguments, stats_groups=2)
        found = torch.autograd.grad(out, leaves, along)
    for have, want in zip(found, torch.autograd.grad(plain(**arguments), leaves, along), strict=True):
        assert_alike(have, want)


@each_backend("upsample_conv2x")
def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32(backend, device):
    arguments = inputs(device, O=12)
    leaves = [value.requires_grad_() for value in arguments.values()]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            out = function(**arguments)
        assert out.dtype == torch.bfloat16
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    with use_backend(upsample_conv2x=backend):
        found = run(upsample_conv2x)
    assert all(grad.dtype == torch.float32 for grad in found[1:])
    for have, want in zip(found, run(plain), strict=True):
        assert (have - want).float().norm() < 0.01 * want.float().norm()


@pytest.fixture
def without_bf16_products(monkeypatch):
    """As on a processor that does not multiply bfloat16: around torch's convolution."""
    monkeypatch.setattr(door, "_multiplies_bf16", lambda: False)


@each_shape("upsample_conv2x")
def test_bf16_phases_no_worse_than_eager(shape, without_bf16_products):
    check_op("upsample_conv2x", "cpu", shape, torch.bfloat16)


@use_backend(upsample_conv2x="cpu")
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_statistics_of_bf16_phases(groups, without_bf16_products, monkeypatch):
    """Of images all at once and one at a time."""
    arguments = inputs(dtype=torch.bfloat16, B=3, H=9, W=37)
    found = []
    for most in (door.PHASES_BYTES, 1):
        monkeypatch.setattr(door, "PHASES_BYTES", most)
        out, stats = upsample_conv2x(**arguments, stats_groups=groups)
        assert_no_worse({"stats": stats}, lambda out: {"stats": statistics(out, groups)}, out)
        found.append(out)
    assert_alike(*found)


def test_what_the_kernels_do_not_take():
    arguments = inputs(dtype=torch.float64)
    with backend.observe() as seen:
        out = upsample_conv2x(**arguments)
    assert not seen and out.dtype == torch.float64
    assert_alike(out, plain(**arguments))
    with use_backend(upsample_conv2x="cpu"), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
        upsample_conv2x(**arguments)


def test_forward_mode_is_not_silently_zero():
    arguments = inputs()
    weight, along = arguments.pop("weight"), inputs()["weight"].flip(0)

    def loss(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: function(weight=w, **arguments).square().sum()

    found, want = (torch.func.jvp(loss(f), (weight,), (along,))[1] for f in (upsample_conv2x, plain))
    assert want.abs() > 1
    assert_alike(found, want)


def test_wrong_input_is_named():
    x, weight, bias = torch.zeros(2, 4, 3, 3), torch.zeros(8, 4, 3, 3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions \(BCHW\) but its shape is \(4, 3, 3\)"):
        upsample_conv2x(x[0], weight)
    with pytest.raises(ValueError, match="weight has C=5 but x has C=4"):
        upsample_conv2x(x, torch.zeros(8, 5, 3, 3))
    with pytest.raises(ValueError, match=r"weight must be \(O, C, 3, 3\) but has shape \(8, 4, 1, 1\)"):
        upsample_conv2x(x, torch.zeros(8, 4, 1, 1))
    with pytest.raises(ValueError, match="bias has O=7 but weight has O=8"):
        upsample_conv2x(x, weight, bias[:7])
    with pytest.raises(ValueError, match="stats_groups must divide the 8 output channels but is 3"):
        upsample_conv2x(x, weight, bias, stats_groups=3)
    with pytest.raises(ValueError, match="stats_groups must divide the 8 output channels but is 0"):
        upsample_conv2x(x, weight, bias, stats_groups=0)
    with pytest.raises(ValueError, match=r"must have one dtype but have torch\.bfloat16 and torch\.float32"):
        upsample_conv2x(x, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match=r"x must be floating point but is torch\.int64"):
        upsample_conv2x(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"x of shape \(2, 4, 0, 3\) and weight .* must not be empty"):
        upsample_conv2x(x[:, :, :0], weight, bias)
