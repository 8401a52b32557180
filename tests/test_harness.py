"""The harness itself: it passes a right operator and finds each way to be wrong."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stellar_fast import backend
from stellar_fast.registry import OpSpec, draw
from tests import harness
from tests.harness import backends_here, check_op, check_registered, each_backend, poisoned_memory


@torch.library.custom_op("stellar_fast::toy", mutates_args=())
def _toy(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    backend_module.ran("toy", backend)
    return wrong["forward"](x, weight)


@_toy.register_fake
def _(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("stellar_fast::toy_backward", mutates_args=())
def _toy_backward(grad: Tensor, x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    backend_module.ran("toy", wrong.get("backend", backend))
    return wrong["backward"](grad, x, weight)


@_toy_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.backend = inputs[2]


_toy.register_autograd(
    lambda ctx, grad: (*_toy_backward(grad, *ctx.saved_tensors, ctx.backend), None), setup_context=_setup
)

backend_module = backend
wrong: dict[str, Any] = {}


def forward(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    return out.copy_(x * weight)


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad * weight, (grad * x).sum(0)


class ToySpec(OpSpec):
    @property
    def function(self) -> Callable[..., Tensor]:
        return lambda x, weight: _toy(x, weight, "cpu")


SPEC = ToySpec(
    name="toy",
    shapes={"small": {"N": 5, "D": 6}},
    make_inputs=lambda shape, dtype, device, generator: {
        "x": draw(generator, shape["N"], shape["D"], dtype=dtype, device=device),
        "weight": draw(generator, shape["D"], dtype=dtype, device=device),
    },
    reference=lambda x, weight: x * weight,
    gradients=("x", "weight"),
)


@pytest.fixture(autouse=True)
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.OPS, "toy", ("cpu", "reference"))
    wrong.clear()
    wrong.update(forward=forward, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["small", {"N": 0, "D": 3}, {"N": 1, "D": 1}])
def test_what_is_right_passes(dtype: torch.dtype, shape: Any) -> None:
    check_op(SPEC, "cpu", shape, dtype)


def test_registration_of_what_is_right_passes() -> None:
    check_registered(SPEC, "cpu")


def unwritten(x: Tensor, weight: Tensor) -> Tensor:
    out = forward(x, weight)
    fresh = torch.empty(x.shape, dtype=x.dtype)
    fresh[:-1] = out[:-1]
    return fresh


def ignores_strides(x: Tensor, weight: Tensor) -> Tensor:
    return x.as_strided(x.shape, (x.shape[1], 1)) * weight


def overwrites(x: Tensor, weight: Tensor) -> Tensor:
    return x.mul_(weight).clone()


def zeros_for_none(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad * weight, torch.empty(weight.shape) if not len(x) else (grad * x).sum(0)


@pytest.mark.parametrize(
    ("part", "function", "message"),
    [
        ("forward", lambda x, w: x * w * (1 + 1e-5), "contiguous: output 0: largest error"),
        ("forward", unwritten, "contiguous: output 0: largest error nan"),
        ("forward", ignores_strides, "6\n  transposed: output 0: error along the tensor"),
        ("forward", overwrites, "contiguous: changed its input x"),
        ("backward", lambda g, x, w: (g * w, (g * x).sum(0) * 1.001), "contiguous: gradient of weight: mean square"),
        ("backward", lambda g, x, w: (g * w.flip(0), (g * x).sum(0)), "contiguous: gradient of x: largest error"),
    ],
)
def test_what_is_wrong_is_named(part: str, function: Callable[..., Any], message: str) -> None:
    wrong[part] = function
    with pytest.raises(AssertionError, match=message) as found:
        check_op(SPEC, "cpu")
    assert "toy by cpu on cpu, torch.float32, N5-D6" in str(found.value)


def test_an_unwritten_gradient_of_an_empty_batch_is_found() -> None:
    wrong["backward"] = zeros_for_none
    check_op(SPEC, "cpu")
    with pytest.raises(AssertionError, match="gradient of weight: largest error nan"):
        check_op(SPEC, "cpu", {"N": 0, "D": 3})


def test_in_16_bits_the_bar_is_eagers_own_error() -> None:
    """Where eager rounds on the way so may others; where it does not, nobody may."""
    rough = dataclasses.replace(SPEC, eager=lambda x, weight: ((1000 + x) - 1000) * weight)
    wrong["forward"] = lambda x, w: x * w + 0.5 * w
    check_op(rough, "cpu", dtype=torch.bfloat16, layouts=("contiguous",))
    with pytest.raises(AssertionError, match="output 0: mean square error"):
        check_op(SPEC, "cpu", dtype=torch.bfloat16)


def changes(x: Tensor, relative: float) -> Iterator[tuple[str, Tensor]]:
    """A tensor with a fault at each of its dimensions: a row that is off, a quarter that is left out, a wrong index."""
    for dim, size in enumerate(x.shape):
        if size > 1:
            wrong, left_out = x.clone(), x.clone()
            wrong.select(dim, size // 2).mul_(1 + relative)
            left_out.narrow(dim, 0, max(1, size // 4)).zero_()
            yield f"a row of dimension {dim} off by {relative:g}", wrong
            yield f"a part of dimension {dim} left out", left_out
            yield f"dimension {dim} read from the next index", x.roll(1, dim)


FP32 = torch.float32
INTEGERS = ("crop_resize", "nearest_code", "token_match")  # a choice shows no small error


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", [op for op in backend.OPS if op != "crop_resize"])
def test_a_planted_fault_is_found(op: str, dtype: torch.dtype) -> None:
    """In each argument: what is left out or misplaced, and in fp32 one row that is off by 1e-3."""
    case = harness.Case(op, "small", dtype, "cpu", 0, {})
    exact, allowed = case.exact(), case.allowed()
    assert harness._wrong(case.ours("reference", case.inputs), exact, allowed, case) == []
    small = dtype == FP32 and op not in INTEGERS
    arguments = {n: x for n, x in case.inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    missed = [
        f"{name}: {what}"
        for name, x in arguments.items()
        for what, changed in changes(x, 1e-3)
        if (small or "off" not in what)
        and not harness._wrong(case.ours("reference", case.inputs | {name: changed}), exact, allowed, case)
    ]
    assert not missed


@pytest.mark.parametrize("op", [op for op in backend.OPS if op not in INTEGERS])
def test_a_planted_factor_is_found(op: str) -> None:
    """1.001 in every tensor; in bf16 where there are thousands of elements, and 1.05 elsewhere."""
    for dtype in (FP32, torch.bfloat16):
        case = harness.Case(op, "small", dtype, "cpu", 0, {})
        exact, allowed = case.exact(), case.allowed()
        for name, want in exact.items():
            if want.is_floating_point():
                factor = 1.001 if dtype == FP32 or want.numel() > 5000 else 1.05
                assert harness.reasons(name, factor * want, want, allowed[name]), (name, dtype)


def test_another_backend_than_the_named_one_is_found() -> None:
    wrong["backend"] = "reference"
    with pytest.raises(AssertionError, match=r"the backward ran \['reference'\]"):
        check_op(SPEC, "cpu")
    with pytest.raises(AssertionError, match=r"by reference .* the forward ran \['cpu'\]"):
        check_op(SPEC, "reference")


def test_a_gradient_on_one_side_alone_is_found() -> None:
    spec = dataclasses.replace(SPEC, reference=lambda x, weight: (x * weight).detach())
    with pytest.raises(AssertionError, match="output 0 requires grad: 1 of 1 values differ"):
        check_op(spec, "cpu")


def test_poison_ends_with_the_block() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_backends_and_their_marks() -> None:
    assert backends_here("crop_resize") == ["cpu", "reference"]
    assert backends_here("nearest_code") == ["cpu", "reference"]
    cases = each_backend("token_attention", "triton", "cpu").args[1]
    assert [(*case.values, [mark.name for mark in case.marks]) for case in cases] == [
        ("triton", "cpu", ["interpreter"]),
        ("triton", "cuda", ["cuda"]),
        ("cpu", "cpu", []),
    ]
