import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stellar_fast.ops.checks import may_skip_dispatch


class SeesAll(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_call_without_gradient_skips_the_dispatcher():
    x, weight = torch.ones(2), nn.Parameter(torch.ones(2))
    assert may_skip_dispatch(x, None)
    assert not may_skip_dispatch(x, weight)
    with torch.no_grad():
        assert may_skip_dispatch(x, weight)
    with torch.inference_mode():
        assert may_skip_dispatch(x, weight)


@pytest.mark.parametrize(
    "block", [SeesAll, SeesFunctions, FakeTensorMode, torch.profiler.profile, torch.autograd.forward_ad.dual_level]
)
def test_what_looks_on_sees_the_operator(block):
    x = torch.ones(2)
    with torch.no_grad(), block():
        assert not may_skip_dispatch(x)


def test_transforms_and_traces_see_the_operator():
    seen = []

    def f(x):
        seen.append(may_skip_dispatch(x))
        return x + 1

    x = torch.ones(2)
    torch.func.vmap(f)(x)
    torch.compile(f, backend="eager")(x)
    assert seen == [False, False]
    assert may_skip_dispatch(x)


def test_subclasses_go_by_the_dispatcher():
    class Other(torch.Tensor):
        pass

    assert not may_skip_dispatch(torch.ones(2).as_subclass(Other))
