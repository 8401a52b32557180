"""The VQGAN by itself; its numbers are held by the golden cases."""

import pytest
import torch

from stellar_fast import VQGAN, VQGANConfig

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
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"encoder"):
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
