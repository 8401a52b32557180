import pytest
import torch
import torch.nn.functional as F

from stellar_fast import backend
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.nn.conv2d import Conv2d


@pytest.fixture
def layer() -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(64, 32, 3, padding=1).requires_grad_(False)


def images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("chosen", ["cpu", "torch"])
def test_the_sum_is_formed_in_the_streams_memory(layer, chosen):
    """By our own kernel, which has the statistics too, and by oneDNN."""
    x, stream = images(64), images(32)
    convolved = F.conv2d(x, layer.weight, layer.bias, padding=1)
    want, address = convolved + stream, stream.data_ptr()
    with backend.use_backend(conv3x3=chosen), backend.observe() as seen:
        torch.testing.assert_close(layer(x), convolved)
        found, found_stats = layer.with_stats(x, 4)
        torch.testing.assert_close(found, convolved)
        out, addend, stats = layer.add(x, stream, 4)
    torch.testing.assert_close(out, want)
    assert out.data_ptr() == address and addend is None
    assert (("conv3x3", "cpu") in seen) == (chosen == "cpu")
    if chosen == "torch":
        assert found_stats is None and stats is None
    else:
        torch.testing.assert_close(found_stats, statistics(convolved, 4))
        torch.testing.assert_close(stats, statistics(want, 4))


@pytest.mark.parametrize("learns", ["weight", "bias", "x"])
def test_gradients_are_those_of_torch(layer, learns):
    x, stream = images(64), images(32)
    leaf = (x if learns == "x" else getattr(layer, learns)).requires_grad_()
    before = stream.clone()
    out, addend, stats = layer.add(x, stream, 4)
    assert stats is None and torch.equal(addend, before)
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    want = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(found, torch.autograd.grad(want.square().sum(), leaf)[0])


@pytest.mark.parametrize("other", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}])
def test_other_convolutions_are_torchs(other):
    layer = Conv2d(64, 32, 3, padding=1, **other).requires_grad_(False)
    x = images(64)
    with backend.observe() as seen:
        found = layer(x)
    assert not seen
    torch.testing.assert_close(found, torch.nn.Conv2d.forward(layer, x))
