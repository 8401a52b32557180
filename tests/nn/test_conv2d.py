"""The convolution that keeps frozen weights laid out: always the numbers of torch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stellar_fast import backend
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.nn.conv2d import Conv2d
from stellar_fast.ops.from_weight import _made
from tests.roundings import assert_alike

FP32, BF16 = torch.float32, torch.bfloat16


def frozen(inputs: int = 5, outputs: int = 7, kernel_size: int = 3, **options) -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, **options).requires_grad_(False)


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


def plain(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("size", [(2, 5, 9, 6), (1, 5, 1, 1), (0, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"kernel_size": 1}], ids=str)
def test_the_same_as_torch(size, options):
    conv, x = frozen(**options), image(*size)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        assert_alike(conv(given), plain(conv, x))
    assert (conv.weight.untyped_storage() in _made) == bool(x.numel())


def test_autocast_computes_in_its_dtype():
    conv, x = frozen(), image(2, 5, 9, 6)
    with torch.autocast("cpu", BF16):
        found, want = conv(x), plain(conv, x)
    assert found.dtype == want.dtype == BF16
    assert_alike(found, want)
    assert_alike(conv(x), plain(conv, x))  # and in fp32 after it


def test_changed_weights_are_seen():
    conv, x = frozen(), image(2, 5, 9, 6)
    before = conv(x)
    conv.weight.mul_(2)
    assert_alike(conv(x), plain(conv, x))
    conv.bias.add_(1)
    assert_alike(conv(x), plain(conv, x))
    conv.load_state_dict(frozen().state_dict())
    assert torch.equal(conv(x), before)
    with torch.inference_mode():
        conv.weight = torch.nn.Parameter(conv.weight * 3, requires_grad=False)
        assert_alike(conv(x), plain(conv, x))


@pytest.mark.parametrize(
    "dtype", [FP32, pytest.param(BF16, marks=pytest.mark.onednn_bf16)], ids=["float32", "bfloat16"]
)
def test_the_sum_takes_the_streams_memory(dtype):
    conv, x, stream = frozen(5, 5).to(dtype), image(2, 5, 9, 6).to(dtype), torch.ones(2, 5, 9, 6, dtype=dtype)
    x, stream = (t.contiguous(memory_format=torch.channels_last) for t in (x, stream))
    want = plain(conv, x) + stream
    total, addend, _ = conv.add(x, stream, 5)
    assert addend is None and total is stream
    assert_alike(total, want)


@pytest.mark.parametrize("needs", ["x", "stream", "weight"])
def test_gradients_are_torchs(needs):
    """Where one is asked for, two terms come back, nothing is overwritten and nothing is kept."""
    conv = frozen(5, 5)
    tensors = {"x": image(2, 5, 9, 6), "stream": image(2, 5, 9, 6), "weight": conv.weight}
    tensors[needs].requires_grad_()
    before = tensors["stream"].clone()
    total, addend, _ = conv.add(tensors["x"], tensors["stream"], 5)
    assert addend is tensors["stream"] and torch.equal(addend.detach(), before)
    (found,) = torch.autograd.grad((total + addend).square().sum(), tensors[needs])
    (want,) = torch.autograd.grad((plain(conv, tensors["x"]) + tensors["stream"]).square().sum(), tensors[needs])
    assert_alike(found, want)


def test_what_is_kept_is_not_part_of_the_module():
    conv, x = frozen(), image(2, 5, 9, 6)
    want = conv(x)
    assert conv.weight.untyped_storage() in _made and conv.state_dict().keys() == {"weight", "bias"}
    for again in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert again.__dict__.keys() == torch.nn.Conv2d(1, 1, 1).__dict__.keys()
        assert again.weight.untyped_storage() not in _made
        assert torch.equal(again(x), want)


@pytest.mark.parametrize(
    "dtype", [FP32, pytest.param(BF16, marks=pytest.mark.onednn_bf16)], ids=["float32", "bfloat16"]
)
def test_images_of_all_sizes_take_one_layout(dtype):
    conv = frozen(16, 24).to(dtype)
    for size in [(2, 16, 9, 6), (1, 16, 1, 1), (1, 16, 70, 3)]:
        x = image(*size).to(dtype)
        torch.testing.assert_close(conv(x), plain(conv, x))
    assert len(_made[conv.weight.untyped_storage()]) == 1


def test_what_looks_on_sees_torchs_convolution(layer):
    """Its FLOPs are counted, it can be mapped, and it has the shape of the result where there are no values."""
    x, stream = images(64), images(32)
    want = F.conv2d(x, layer.weight, layer.bias, padding=1)
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(layer(x), want)
        layer.add(x, stream, 4)
    assert counter.get_total_flops() == 2 * (2 * 2 * 32 * 32 * 32 * 64 * 9)
    torch.testing.assert_close(torch.vmap(lambda image: layer(image[None])[0])(x), want)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == want.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty_like(x)).shape == want.shape


@pytest.fixture
def layer() -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(64, 32, 3, padding=1).requires_grad_(False)


def images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("chosen", ["cpu", "torch"])
def test_statistics_come_along_with_fewer_products(layer, chosen):
    """By our own kernel, which has the statistics too, and by oneDNN."""
    x, stream = images(64), images(32)
    convolved = F.conv2d(x, layer.weight, layer.bias, padding=1)
    want, address = convolved + stream, stream.data_ptr()
    with backend.use_backend(conv3x3=chosen), backend.observe() as seen:
        assert_alike(layer(x), convolved)
        found, found_stats = layer.with_stats(x, 4)
        assert_alike(found, convolved)
        out, addend, stats = layer.add(x, stream, 4)
    assert_alike(out, want)
    assert out.data_ptr() == address and addend is None
    assert (("conv3x3", "cpu") in seen) == (chosen == "cpu")
    if chosen == "torch":
        assert found_stats is None and stats is None
    else:
        assert_alike(found_stats, statistics(convolved, 4))
        assert_alike(stats, statistics(want, 4))


@pytest.mark.parametrize("learns", ["weight", "bias", "x"])
def test_gradients_of_large_convolutions_are_torchs(layer, learns):
    x, stream = images(64), images(32)
    leaf = (x if learns == "x" else getattr(layer, learns)).requires_grad_()
    before = stream.clone()
    out, addend, stats = layer.add(x, stream, 4)
    assert stats is None and torch.equal(addend, before)
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    want = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert_alike(found, torch.autograd.grad(want.square().sum(), leaf)[0])


@pytest.mark.parametrize("other", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}])
def test_other_convolutions_are_torchs(other):
    layer = Conv2d(64, 32, 3, padding=1, **other).requires_grad_(False)
    x = images(64)
    with backend.observe() as seen:
        found = layer(x)
    assert not seen
    assert_alike(found, torch.nn.Conv2d.forward(layer, x))
