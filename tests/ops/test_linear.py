import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast import backend, native
from stellar_fast.backend import use_backend
from stellar_fast.kernels.linear import config
from stellar_fast.nn.linear import Linear
from stellar_fast.ops import linear, scratch
from stellar_fast.tune.lookup import Problem, force
from tests.harness import check_op, check_registered, each_backend, each_shape, poisoned_memory
from tests.roundings import assert_alike, assert_no_worse

LARGE = (70, 130, 190)  # rows, in, out: above the size from which oneDNN is taken; odd, so no width is a multiple of 16
GELU = pytest.mark.parametrize("gelu", [None, "input", "output"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

BY_ONEDNN = pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.onednn_bf16)],
    ids=["float32", "bfloat16"],
)


def inputs(rows: int, width: int, out: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator) for size in ((rows, width), (out, width), (out,))]


def who_ran(*args, **kwargs) -> set[tuple[str, str]]:
    with backend.observe() as seen:
        linear(*args, **kwargs)
    return seen


@GELU
@DTYPE
@each_backend("linear")
@each_shape("linear")
def test_no_worse_than_eager(backend, device, shape, dtype, gelu):
    # a GELU hands on the product's error at its steepest place: of few values the largest is a matter of luck
    check_op("linear", backend, shape, dtype, device, gelu=gelu)


@GELU
@DTYPE
@each_backend("linear", "onednn")
def test_without_bias(backend, device, dtype, gelu):
    check_op("linear", backend, "small", dtype, device, gelu=gelu, bias=None)


@GELU
@each_backend("linear")
def test_registration(backend, device, gelu):
    check_registered("linear", backend, device=device, gelu=gelu)


@BY_ONEDNN
@pytest.mark.parametrize("widths", [(48, 64), (64, 48), (37, 19)])
def test_every_way_of_a_product(dtype, widths):
    width, out = widths
    sizes = {"T": 70, "I": width, "O": out}
    problem = Problem("linear", config, tuple(sizes.items()), dtype, torch.device("cpu"))
    tried = list(config.candidates(sizes, dtype))
    assert tried[0] == problem.heuristic() and all(config.is_valid(found, sizes, dtype) for found in tried)
    for found in tried:
        grad_weight = config.Product(found.grad_weight.way, min(found.grad_weight.slice_rows, 32))
        with force(problem, replace(found, grad_weight=grad_weight)):
            # slices round their sums once more
            check_op("linear", "onednn", {"R": 70, "I": width, "O": out}, dtype)


def test_heuristic_is_a_candidate():
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ((2170, 768, 3072), (2170, 3072, 768), (2170, 768, 768), (7, 5, 3)):
            shape = dict(zip("TIO", sizes, strict=True))
            assert config.is_valid(config.heuristic(shape, dtype, "cpu"), shape, dtype)


def test_auto_takes_onednn_where_it_suits():
    x, weight, bias = inputs(*LARGE)
    onednn = {("linear", "onednn")}
    assert who_ran(x, weight, bias) == onednn
    assert not who_ran(x[:1, :4], weight[:3, :4], None), "too small"
    assert not who_ran(x.half(), weight.half(), None), "fp16"
    assert not who_ran(x.double(), weight.double(), None), "fp64"
    with use_backend(linear="torch"):
        assert not who_ran(x, weight, bias)


@pytest.mark.onednn_bf16
def test_auto_takes_onednn_for_bf16():
    x, weight, bias = inputs(*LARGE)
    onednn = {("linear", "onednn")}
    assert who_ran(x.bfloat16(), weight.bfloat16(), None) == onednn
    with torch.autocast("cpu", torch.bfloat16):
        assert who_ran(x, weight, bias) == onednn


def test_processor_without_bf16_products(monkeypatch):
    monkeypatch.setattr(sys.modules["stellar_fast.ops.linear"], "_onednn_has_bf16", lambda: False)
    x, weight, _ = (t.bfloat16() for t in inputs(*LARGE))
    assert not who_ran(x, weight)
    with use_backend(linear="onednn"), pytest.raises(ValueError, match=r"torch\.bfloat16 on this processor"):
        linear(x, weight)


def test_request_for_onednn_is_honoured_or_raises():
    x, weight, bias = inputs(3, 5, 7)
    with use_backend(linear="onednn"):
        assert who_ran(x, weight, bias) == {("linear", "onednn")}, "however small"
        with pytest.raises(ValueError, match=r"'onednn' was asked for, but it does not compute in torch\.float64"):
            linear(x.double(), weight.double())
        with pytest.raises(ValueError, match=r"does not compute in torch\.bfloat16 and torch\.float32"):
            linear(x.bfloat16(), weight)
        with pytest.raises(ValueError, match="it has no forward-mode derivative"):
            torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.ones_like(x),))


@pytest.mark.onednn_bf16
@GELU
def test_autocast(gelu):
    tensors = [t.requires_grad_() for t in inputs(*LARGE)]
    direction = torch.randn(LARGE[0], LARGE[2])
    found = {}
    for name in ("onednn", "torch"):
        with use_backend(linear=name), torch.autocast("cpu", torch.bfloat16):
            out = linear(*tensors, gelu=gelu)
        assert out.dtype == torch.bfloat16
        found[name] = [out, *torch.autograd.grad(out, tensors, direction.bfloat16())]
    for have, want in zip(*found.values(), strict=True):
        assert have.dtype == want.dtype
        assert_alike(have.bfloat16(), want.bfloat16())


@pytest.mark.parametrize("width", [130, 2560])
def test_a_parameter_takes_its_gradient_without_a_copy(width):
    weight = nn.Parameter(torch.randn(190, width))
    made = []

    class Storages(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.name() == "stellar_fast::linear_backward":
                made.append(result[1].data_ptr())
            return result

    out = linear(torch.randn(70, width), weight)
    with Storages():
        out.sum().backward()
    assert made == [weight.grad.data_ptr()]


def test_gelu_of_the_input_keeps_one_hidden_activation():
    fc1, fc2 = Linear(64, 256), Linear(256, 64)
    x = torch.randn(100, 64)

    def kept(forward) -> list[int]:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            forward().sum()
        return sizes

    assert kept(lambda: fc2(fc1(x), gelu="input")).count(25600) == 1
    assert kept(lambda: fc2(F.gelu(fc1(x)))).count(25600) == 2


def test_views_and_more_dimensions():
    x, weight, bias = inputs(*LARGE)
    wide = torch.randn(2, LARGE[1], 70).mT  # not contiguous
    with use_backend(linear="onednn"):
        assert_alike(linear(wide, weight, bias), F.linear(wide, weight, bias))
        assert_alike(linear(x.expand(3, *x.shape), weight), F.linear(x.expand(3, *x.shape), weight))
        leaf = x.clone().requires_grad_()
        linear(leaf, weight, bias).sum().backward()  # an expanded gradient of stride 0
        assert_alike(leaf.grad, weight.sum(0).expand_as(x))
        assert linear(x[0], weight, bias).shape == (LARGE[2],)
        assert linear(x[:0], weight, bias).shape == (0, LARGE[2])


def test_forward_mode_is_not_silently_zero():
    x, weight, _ = inputs(*LARGE)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.ones_like(x),))
    assert_alike(tangent, weight.sum(1).expand_as(tangent))


class TestNativeGelu:
    """gelu_forward and gelu_backward of the native module, beneath the products' own errors."""

    @staticmethod
    def ours(x: Tensor, grad: Tensor, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        with poisoned_memory():
            out, again, grad_x = (torch.empty_like(x) for _ in range(3))
        facts = x.numel(), x.dtype == torch.bfloat16, threads
        native.module().gelu_forward(x.data_ptr(), out.data_ptr(), *facts)
        native.module().gelu_backward(x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), again.data_ptr(), *facts)
        assert torch.equal(out.nan_to_num(), again.nan_to_num())
        native.module().gelu_backward(x.data_ptr(), grad.data_ptr(), again.data_ptr(), 0, *facts)
        assert torch.equal(grad_x.nan_to_num(), again.nan_to_num())
        return out, grad_x, x

    @DTYPE
    @pytest.mark.parametrize("count", [0, 1, 15, 33, 100_003])
    def test_no_worse_than_torch(self, dtype, count):
        x = torch.linspace(-14, 14, count).to(dtype)
        grad = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
        out, grad_x, _ = self.ours(x, grad, threads=2)

        def formula(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
            return {"out": F.gelu(x), "gradient": torch.ops.aten.gelu_backward(grad, x)}

        assert_no_worse({"out": out, "gradient": grad_x}, formula, x, grad)

    def test_small_results_are_as_exact_as_large_ones(self):
        x = torch.linspace(-6, -1, 10_001)
        out, _, _ = self.ours(x, x)
        exact = F.gelu(x.double())
        assert ((out - exact) / exact).abs().max() < 1e-5  # torch forms 1 - erf, which is 0 at -6

    @DTYPE
    def test_limits(self, dtype):
        big = torch.finfo(dtype).max
        x = torch.tensor([0.0, -0.0, big, -big, 20.0, -20.0, torch.inf, torch.nan], dtype=dtype)
        out, grad_x, _ = self.ours(x, torch.ones_like(x))
        torch.testing.assert_close(out[:7], torch.tensor([0.0, 0.0, big, 0.0, 20.0, 0.0, torch.inf], dtype=dtype))
        torch.testing.assert_close(grad_x[:6], torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0], dtype=dtype))
        assert out[7].isnan() and grad_x[7].isnan()


@pytest.mark.parametrize("gelu", ["input", "output"])
@BY_ONEDNN
def test_gelu_without_the_native_module(monkeypatch, gelu, dtype):
    monkeypatch.setattr(native, "available", lambda: False)
    check_op("linear", "onednn", "small", dtype, gelu=gelu)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(4, 5)), r"x of shape \(2, 3\) does not fit weight of shape \(4, 5\)"),
        ((torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)), r"bias of shape \(3,\) does not fit weight"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3)), "x must be floating point but is torch.int64"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear(*arguments)


def test_unknown_gelu_is_named():
    with pytest.raises(ValueError, match="gelu must be None, 'input' or 'output' but is 'tanh'"):
        linear(*inputs(*LARGE), gelu="tanh")


def test_mixed_dtypes_are_refused():
    x, weight, bias = inputs(3, 5, 7)
    with pytest.raises(ValueError, match=r"must have one dtype but have torch\.bfloat16 and torch\.float32"):
        linear(x, weight.bfloat16(), bias.bfloat16())


@pytest.mark.onednn_bf16
def test_every_backend_returns_the_same_dtype():
    x, weight, bias = (t.bfloat16() for t in inputs(*LARGE))
    for name in ("onednn", "torch", "reference"):
        with use_backend(linear=name):
            assert linear(x, weight, bias).dtype == torch.bfloat16


def test_transforms_of_torch_func_take_torch():
    x, weight, bias = inputs(*LARGE)
    grad = torch.func.grad(lambda w: linear(x, w, bias).square().sum())(weight)
    assert_alike(grad, 2 * (x @ weight.T + bias).T @ x)


def test_scratch_is_bounded_and_given_back():
    scratch.release_scratch()
    x, weight, bias = (t.requires_grad_() for t in inputs(*LARGE))
    linear(x, weight, bias, gelu="input").sum().backward()
    kept = vars(scratch._of_thread)
    assert bool(kept) == native.available()
    assert sum(block.numel() for block in kept.values()) <= 3 * scratch.LIMIT
    assert scratch.scratch((scratch.LIMIT + 1,), torch.uint8, "gelu") is not kept.get("gelu")
    scratch.release_scratch()
    assert not vars(scratch._of_thread)
