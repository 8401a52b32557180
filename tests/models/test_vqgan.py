"""The VQGAN by itself; its numbers are held by the golden cases."""

import sys

import pytest
import torch

from stellar_fast import VQGAN, VQGANConfig
from tests.roundings import assert_alike

SMALL = VQGANConfig((1, 1, 2), 3, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)


@pytest.fixture
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(SMALL)


def test_sizes_there_and_back(vqgan):
    codes = vqgan.encode(torch.rand(2, 3, 32, 16))
    assert codes.shape == (2, 8, 4)
    assert codes.dtype == torch.int64
    images = vqgan.decode(codes)
    assert images.shape == (2, 3, 32, 16)
    assert 0 <= images.min() <= images.max() <= 1


def test_codes_are_the_nearest(vqgan):
    images = torch.rand(1, 3, 16, 16)
    z = vqgan.encoder(images).permute(0, 2, 3, 1)
    expected = torch.cdist(z.double(), vqgan.quantize.embedding.weight.double()[None, None]).argmin(-1)
    assert torch.equal(vqgan.encode(images), expected)


def test_names_of_the_published_file():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VQGAN().state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (1024, 256)
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.up.4.upsample_conv.bias"] == (512,)
    assert "decoder.up.0.upsample_conv.bias" not in shapes
    assert "encoder.conv_in.bias" not in shapes


def test_weights_from_files(vqgan, tmp_path):
    torch.save(vqgan.state_dict(), tmp_path / "vqgan.bin")
    again = VQGAN.from_pretrained(tmp_path / "vqgan.bin", SMALL)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.decode(again.encode(images)), vqgan.decode(vqgan.encode(images)))
    with pytest.raises(
        RuntimeError,
        match=r"vqgan\.bin: .*; missing tensors: encoder\.down\.0\.block\.1\.norm1\.weight, .* and 97 more; ",
    ):
        VQGAN.from_pretrained(tmp_path / "vqgan.bin", VQGANConfig())
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent\.bin"):
        VQGAN.from_pretrained(tmp_path / "absent.bin")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.encode(torch.rand(1, 3, 30, 32)), r"sides multiples of 4, not \(1, 3, 30, 32\)"),
        (lambda v: v.decode(torch.zeros(1, 16, dtype=torch.int64)), r"codes must be \(B, h, w\) int64"),
        (lambda v: v.decode(torch.full((1, 2, 2), 16)), r"codes span \[16, 16\] but the codebook has 16 entries"),
        (lambda _: VQGANConfig((1, 2), 5), r"channel_mult \(1, 2\) does not have num_resolutions 5 levels"),
    ],
)
def test_wrong_input_is_named(vqgan, call, message):
    with pytest.raises(ValueError, match=message):
        call(vqgan)


def test_gradients_pass_through_the_frozen_decoder(vqgan):
    z = torch.rand(1, 8, 4, 4, requires_grad=True)
    vqgan.decoder(z).sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in vqgan.parameters())


def test_memory_that_is_reused_is_not_seen(vqgan):
    """What chunks and transient memory give is what is computed where gradients are kept, and stays."""
    codes = torch.arange(48).view(3, 4, 4) % 16
    with torch.no_grad():
        first = vqgan.decode(codes)
        kept = first.clone()
        vqgan.decode(codes.flip(0))
    assert torch.equal(first, kept)
    z = vqgan.quantize.embedding(codes).permute(0, 3, 1, 2).requires_grad_()
    torch.testing.assert_close(first, vqgan.decoder(z).clamp(0, 1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 2**12, 2**30])
def test_any_number_of_images_at_a_time(vqgan, monkeypatch, limit):
    images = torch.rand(5, 3, 32, 48)
    codes, decoded = vqgan.encode(images), vqgan.decode(torch.zeros(5, 4, 3, dtype=torch.int64))
    monkeypatch.setattr(sys.modules["stellar_fast.models.vqgan"], "CHUNK_BYTES", limit)
    assert torch.equal(vqgan.encode(images), codes)
    assert_alike(vqgan.decode(torch.zeros(5, 4, 3, dtype=torch.int64)), decoded)
    assert vqgan.encode(images[:0]).shape == (0, 8, 12)
    assert vqgan.decode(torch.zeros(0, 4, 3, dtype=torch.int64)).shape == (0, 3, 16, 12)


def test_autocast_stays_near_fp32(vqgan):
    images = vqgan.decode(torch.arange(16).view(1, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        half = vqgan.decode(torch.arange(16).view(1, 4, 4))
    assert half.dtype == torch.bfloat16
    assert (half.float() - images).abs().max() < 0.05
