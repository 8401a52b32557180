"""What is kept of a weight follows it, whoever writes it and however."""

import copy
import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast import native
from stellar_fast.backend import use_backend
from stellar_fast.models.vqgan import VQGAN, VQGANConfig
from stellar_fast.nn.conv2d import Conv2d
from stellar_fast.nn.upsample_conv2x import UpsampleConv2x
from stellar_fast.ops.from_weight import from_weight, weights_at_rest

upsample = importlib.import_module("stellar_fast.ops.upsample_conv2x")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def upsampled(x: Tensor, layer: nn.Module) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"), layer)


# how the layer is made, the side of its images, and torch's formula; by oneDNN, Winograd, nine products, four phases
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, Callable[..., Tensor]]] = {
    "onednn": (partial(Conv2d, 32, 48, 3, padding=1), 6, conv),
    "onednn_1x1": (partial(Conv2d, 32, 48, 1), 6, conv),
    "winograd": (partial(Conv2d, 32, 48, 3, padding=1), 40, conv),
    "products": (partial(UpsampleConv2x, 32, 48), 6, upsampled),
    "phases": (partial(UpsampleConv2x, 32, 48), 6, upsampled),
}


def _swap(p: nn.Parameter) -> None:
    p.data = p.data.flip(0) * 2


def _copy(p: nn.Parameter) -> None:
    p.data.copy_(p.data.flip(0))


def _scale(p: nn.Parameter) -> None:
    p.data.mul_(2)


def _negate(p: nn.Parameter) -> None:
    p.data.neg_()


def _one_value(p: nn.Parameter) -> None:
    p.data.view(-1)[-1] += 8


def _exchange(p: nn.Parameter) -> None:
    flat = p.data.view(-1)
    flat[[3, 700]] = flat[[700, 3]] * torch.tensor([-1, 1])


def _numpy(p: nn.Parameter) -> None:
    bits = p.detach().view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).numpy()
    bits[...] = bits[::-1].copy()


def _foreach(p: nn.Parameter) -> None:
    torch._foreach_lerp_([p.data], [torch.ones_like(p)], 0.5)


def _untraced(p: nn.Parameter) -> None:  # as FSDP fills what it gathers
    with torch.autograd._unsafe_preserve_version_counter(p):
        p += 1


def _optimiser(p: nn.Parameter) -> None:
    p.requires_grad_()
    p.grad = torch.randn_like(p)
    torch.optim.AdamW([p], lr=0.5, fused=True).step()
    p.requires_grad_(False)


def _storage(p: nn.Parameter) -> None:
    p.untyped_storage().copy_((p.detach() * 3).untyped_storage())


def _set(p: nn.Parameter) -> None:
    p.set_(p.detach().flip(1).contiguous())


def _swapped_tensors(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() - 1, requires_grad=False))


def _inference(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.data.mul_(-1)


def _layout(p: nn.Parameter) -> None:
    p.data = (p.data * 2).contiguous(memory_format=torch.channels_last)


WRITES = [value for name, value in list(globals().items()) if name.startswith("_") and callable(value)]


@pytest.fixture(params=LAYERS)
def layer(request, monkeypatch) -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    make, side, plain = LAYERS[request.param]
    torch.manual_seed(0)
    if request.param == "phases":
        monkeypatch.setattr(upsample, "_multiplies_bf16", lambda: False)
    return make().requires_grad_(False), torch.randn(1, 32, side, side), plain


@DTYPES
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
def test_every_write_is_seen(layer, dtype, write):
    module, x, plain = layer
    module, x = module.to(dtype), x.to(dtype)
    alias = module.weight.data  # taken before the first call, written after it

    def check() -> Tensor:
        with use_backend(upsample_conv2x="cpu"):
            found = module(x)
        want = plain(x.float(), copy.deepcopy(module).float())
        error = (found - want).norm() / want.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
        return found

    before = check()
    assert torch.equal(check(), before)
    write(module.weight)
    after = check()
    assert not torch.equal(after, before)
    alias.fill_(1)
    check()


@DTYPES
def test_a_frozen_network_follows_a_swap_to_averaged_weights(dtype):
    """Codes and images of a VQGAN are those of the weights that it has now, and after a swap back the first ones."""
    torch.manual_seed(0)
    sizes = VQGANConfig(
        hidden_channels=32, channel_mult=(1, 2), num_resolutions=2, num_res_blocks=1, z_channels=16, num_embeddings=64
    )
    model, other = VQGAN(sizes), VQGAN(sizes)
    images = torch.rand(3, 3, 64, 64)

    def run(model: VQGAN) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            codes = model.encode(images)
            return codes, model.decode(torch.arange(64).view(1, 8, 8))

    first, second = run(model), run(other)
    kept = {name: p.data for name, p in model.named_parameters()}
    for name, p in other.named_parameters():
        model.get_parameter(name).data = p.data
    assert all(map(torch.equal, run(model), second))
    for name, p in model.named_parameters():
        p.data = kept[name].clone()
    assert all(map(torch.equal, run(model), first))
    for name, p in other.named_parameters():
        model.get_parameter(name).data.copy_(p.data)
    assert all(map(torch.equal, run(model), second))
    assert not torch.equal(first[1], second[1])


def test_weights_at_rest_are_read_once():
    weight, made = torch.randn(4, 4, 3, 3), []

    def make(weight: Tensor) -> Tensor:
        made.append(weight.clone())
        return weight + 1

    with weights_at_rest():
        first = from_weight(make, weight, torch.float32)
        weight.data.mul_(2)
        assert from_weight(make, weight, torch.float32) is first  # who opens the block says that this is not done
    assert torch.equal(from_weight(make, weight, torch.float32), weight + 1)
    assert len(made) == 2
    view = weight[:, :2]
    assert torch.equal(from_weight(make, view, torch.float32), view + 1)
    assert torch.equal(from_weight(make, view, torch.float32), view + 1)
    assert len(made) == 4  # of what does not lie together nothing is kept


@pytest.mark.parametrize("size", [0, 1, 3, 511, 512, 513, 5000, (1 << 18) + 7, (1 << 21) + 1])
def test_a_fingerprint_is_of_every_byte_and_its_place(size):
    """And the same wherever the bytes lie and however many threads read them."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(256, (size + 64,), dtype=torch.uint8, generator=generator)
    block = wide[5 : 5 + size]

    def found(block: Tensor, threads: int = 1) -> int:
        return native.module().fingerprint(block.data_ptr(), block.numel(), threads)

    want = found(block)
    assert {found(block, 2), found(block, 7), found(block.clone(), 3)} == {want}
    seen = {want, found(wide[5 : 6 + size])}
    places = {0, 1, size // 2, size - 2, size - 1} & set(range(size))
    for place in places:
        for bit in (0, 7):
            block[place] ^= 1 << bit
            seen.add(found(block, 2))
            block[place] ^= 1 << bit
    assert len(seen) == 2 + 2 * len(places)
    if size > 5000:  # what sums and exclusive ors do not see
        seen = {want}
        for change in (lambda b: b.flip(0), lambda b: b.roll(512), lambda b: b.roll(1 << 18), lambda b: b ^ 0x80):
            seen.add(found(change(block), 2))
        assert len(seen) == 5
