import pytest
import torch
import torch.nn.functional as F

from stellar_fast.backend import use_backend
from stellar_fast.ops import linear

LARGE = (70, 130, 190)  # rows, in, out: above the size from which oneDNN is taken; odd, so no width is a multiple of 16


def inputs(rows: int, width: int, out: int, bias: bool = True) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(out, width, generator=generator)
    return [x, weight, torch.randn(out, generator=generator) if bias else None]


def gradients(function, tensors, direction) -> list[torch.Tensor]:
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(direction.to(out.dtype))
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("backend", ["onednn", "torch", "reference"])
@pytest.mark.parametrize(("shape", "bias"), [(LARGE, True), (LARGE, False), ((3, 5, 7), True), ((1, 2048, 1024), True)])
def test_no_worse_than_eager(backend, shape, bias):
    tensors = inputs(*shape, bias)
    direction = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    exact = gradients(F.linear, [t if t is None else t.double() for t in tensors], direction)
    eager = gradients(F.linear, tensors, direction)
    with use_backend(linear=backend):
        ours = gradients(linear, tensors, direction)
    for have, torchs, want in zip(ours, eager, exact, strict=True):
        assert have.dtype == torch.float32
        assert (have - want).abs().max() <= 1.5 * (torchs - want).abs().max() + 1e-6 * want.abs().max()


def test_onednn_really_runs_where_it_suits_and_only_there():
    x, weight, bias = inputs(*LARGE)
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    def ran(*args) -> bool:
        names.clear()
        with Names():
            linear(*args)
        return "stellar_fast::linear_onednn" in names

    with use_backend(linear="onednn"):
        assert ran(x, weight, bias)
        assert not ran(x[:1, :4], weight[:3, :4], None), "too small"
        assert not ran(x.bfloat16(), weight.bfloat16(), None), "not fp32"
        with torch.autocast("cpu", torch.bfloat16):
            assert not ran(x, weight, bias)
            assert linear(x, weight, bias).dtype == torch.bfloat16
    with use_backend(linear="torch"):
        assert not ran(x, weight, bias)


def test_views_and_more_dimensions():
    x, weight, bias = inputs(*LARGE)
    wide = torch.randn(2, LARGE[1], 70).mT  # not contiguous
    with use_backend(linear="onednn"):
        torch.testing.assert_close(linear(wide, weight, bias), F.linear(wide, weight, bias), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear(x.expand(3, *x.shape), weight), F.linear(x.expand(3, *x.shape), weight))
        leaf = x.clone().requires_grad_()
        linear(leaf, weight, bias).sum().backward()  # an expanded gradient of stride 0
        torch.testing.assert_close(leaf.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
        assert linear(x[:0], weight, bias).shape == (0, LARGE[2])


def test_registration_and_compile():
    tensors = [t.requires_grad_() for t in inputs(*LARGE)]
    torch.library.opcheck(torch.ops.stellar_fast.linear_onednn.default, tuple(tensors))
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    direction = torch.randn(LARGE[0], LARGE[2])
    for have, want in zip(gradients(compiled, tensors, direction), gradients(linear, tensors, direction), strict=True):
        torch.testing.assert_close(have, want)


def test_forward_mode_is_not_silently_zero():
    x, weight, bias = inputs(*LARGE)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, weight.sum(1).expand_as(tangent), rtol=1e-4, atol=1e-4)


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
