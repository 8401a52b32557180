"""StellarEncoder as a user meets it: sizes, inputs, outputs, precision, torch.compile, export of errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stellar_fast import EncoderConfig, StellarEncoder, StellarOutput
from stellar_fast.models.encoder import ViewBatch
from tests.conftest import SMALL_ENCODER
from tests.roundings import assert_alike


@pytest.fixture
def encoder() -> StellarEncoder:
    torch.manual_seed(0)
    return StellarEncoder(SMALL_ENCODER, num_sparse_tokens=4)


def test_output_answers_to_attributes_and_keys(encoder):
    output = encoder(torch.rand(2, 3, 32, 32))
    assert isinstance(output, StellarOutput)
    shapes = {name: tuple(tensor.shape) for name, tensor in output.items()}
    assert shapes == {
        "cls": (2, 1, 48),
        "sparse": (2, 4, 48),
        "dense": (2, 16, 48),
        "spatial": (2, 16, 4),
        "lowrank": (2, 16, 48),
        "peak_dist": (2, 4),
        "concat": (2, 4, 64),
    }
    assert output["sparse"] is output.sparse
    assert_alike(output.lowrank, output.spatial @ output.sparse)
    assert_alike(output.spatial.sum(-1), torch.ones(2, 16))
    assert_alike(output.concat[..., 48:], output.spatial.mT)
    assert not output.peak_dist.requires_grad
    with pytest.raises(KeyError, match="'tokens' is not one of cls, sparse"):
        output["tokens"]


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(32, 32, (4, 4)), (40, 24, (5, 3)), (47, 8, (5, 1)), (8, 8, (1, 1))]
)
def test_any_size_and_the_remainder_is_ignored(encoder, height, width, grid):
    images = torch.rand(1, 3, height, width)
    output = encoder(images)
    assert output.grid == grid
    assert output.dense.shape[1] == grid[0] * grid[1]
    cropped = encoder(images[..., : grid[0] * 8, : grid[1] * 8])
    assert_alike(output.dense, cropped.dense)


def test_position_is_resized_by_size_and_cls_is_not(encoder):
    position = encoder.position((6, 3))
    table = encoder.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(6, 3), mode="bicubic", align_corners=False)
    assert_alike(position[:, 1:], expected.flatten(2).mT)
    assert_alike(position[:, :1], encoder.pos_embed[:, :1])


def test_uint8_is_the_same_image(encoder):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert_alike(encoder(pixels).sparse, encoder(pixels.float() / 255).sparse)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"must be \(B, 3, H, W\) but has shape \(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), r"has shape \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 7), "32x7 pixels hold no patch of 8x8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "uint8 or floating point .* is torch.int64"),
        (torch.full((1, 3, 32, 32), 255.0), r"lie in \[0, 1\] but span \[255, 255\]"),
        (torch.full((1, 3, 32, 32), -0.5), r"lie in \[0, 1\] but span \[-0.5, -0.5\]"),
        (torch.full((1, 3, 32, 32), torch.nan), r"lie in \[0, 1\] but span \[nan, nan\]"),
    ],
)
def test_wrong_images_are_named(encoder, images, message):
    with pytest.raises(ValueError, match=message):
        encoder(images)


def test_rounding_beyond_the_range_is_no_error(encoder):
    encoder(torch.full((1, 3, 32, 32), 1 + 3e-7))


def test_views_in_one_pass_are_the_images_each_alone(encoder):
    whole, small = torch.rand(2, 3, 32, 32), torch.rand(3, 3, 16, 24)
    keep = torch.tensor([[0, 5, 9], [15, 2, 3]])
    views = [ViewBatch(whole), ViewBatch(whole, keep, "cls+sparse"), ViewBatch(small, rows="cls"), ViewBatch(small)]
    clean, masked, local, dense = encoder(views)
    alone, alone_masked, alone_small = encoder(whole), encoder(whole, keep), encoder(small)
    for ours, theirs in ((clean, alone), (dense, alone_small)):
        for name in ("cls", "sparse", "dense"):
            assert_alike(getattr(ours, name), theirs[name])
        assert_alike(ours.query, encoder.dense_proj(theirs.dense))
        assert_alike(ours.key, encoder.sparse_proj(theirs.sparse))
    assert_alike(masked.cls, alone_masked.cls)
    assert_alike(masked.sparse, alone_masked.sparse)
    assert_alike(local.cls, alone_small.cls)
    assert masked.dense is None and masked.query is None
    assert local.sparse is None and local.dense is None


def test_rows_that_nobody_reads_are_not_computed(encoder):
    rows = []
    last = encoder.transformer.blocks[-1].mlp.fc1
    last.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    images = torch.rand(3, 3, 32, 32)
    encoder([ViewBatch(images, rows="cls"), ViewBatch(images, rows="cls+sparse")])
    assert rows == [3 * 1 + 3 * 5]


def test_gradients_of_views_are_those_of_the_images_alone(encoder):
    whole, small = torch.rand(2, 3, 32, 32), torch.rand(3, 3, 16, 24)
    clean, local = encoder([ViewBatch(whole), ViewBatch(small, rows="cls")])
    (clean.dense.square().sum() + clean.sparse.sum() + local.cls.pow(3).sum()).backward()
    ours = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    clean = encoder(whole)
    (clean.dense.square().sum() + clean.sparse.sum() + encoder(small).cls.pow(3).sum()).backward()
    for name, gradient in ours.items():
        expected = dict(encoder.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item() + 1e-6, rtol=1e-4)


def test_wrong_views_are_named(encoder):
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="there are 0 views"):
        encoder([])
    with pytest.raises(ValueError, match=r"rows must be one of 'all', 'cls', 'cls\+sparse' but is 'dense'"):
        encoder([ViewBatch(images, rows="dense")])
    with pytest.raises(ValueError, match="keep_indices belong into each ViewBatch"):
        encoder([ViewBatch(images)], torch.zeros(1, 1, dtype=torch.int64))


def test_presets():
    with torch.device("meta"):
        assert StellarEncoder("stellar-b8").num_sparse_tokens == 8
        assert StellarEncoder("b24").num_sparse_tokens == 24
        assert StellarEncoder("h16").config.patch_size == 14
        parameters = sum(p.numel() for p in StellarEncoder("b16").parameters())
    assert round(parameters / 1e6) == 87  # 86 M trunk, two projections
    with pytest.raises(ValueError, match=r"unknown preset 'b17': choose one of b16, l16"):
        StellarEncoder("b17")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EncoderConfig(hidden_size=50, num_attention_heads=12), "hidden_size 50 .* num_attention_heads 12"),
        (lambda: EncoderConfig(image_size=8, patch_size=16), "image_size 8 is smaller than patch_size 16"),
        (lambda: EncoderConfig(num_hidden_layers=0), "num_hidden_layers must be at least 1 but is 0"),
        (lambda: StellarEncoder(SMALL_ENCODER, num_sparse_tokens=-1), "num_sparse_tokens must be at least 1 but is -1"),
        (lambda: StellarEncoder("tiny", num_sparse_tokens=0), "num_sparse_tokens must be at least 1 but is 0"),
        (lambda: StellarEncoder(SMALL_ENCODER, spatial_temp=0.0), "spatial_temp must be positive or None but is 0.0"),
    ],
)
def test_wrong_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_autocast_keeps_the_residual_stream_in_fp32(encoder):
    images = torch.rand(2, 3, 32, 32)
    exact = encoder(images)
    stream, products = [], []
    for block in encoder.transformer.blocks:
        block.register_forward_hook(lambda _, __, out: stream.append(out[0].dtype))
        block.mlp.fc1.register_forward_hook(lambda _, __, out: products.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(images)
    assert stream == [torch.float32] * 2
    assert products == [torch.bfloat16] * 2
    assert output.spatial.dtype == torch.float32
    assert 0 < (output.sparse - exact.sparse).abs().max() < 0.05


def test_empty_batch_and_gradients_on_a_view(encoder):
    assert encoder(torch.rand(0, 3, 32, 32)).sparse.shape == (0, 4, 48)
    images = torch.rand(2, 32, 32, 3).permute(0, 3, 1, 2)  # not contiguous
    assert_alike(encoder(images).cls, encoder(images.contiguous()).cls)
    encoder(images).lowrank.square().sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters())
    assert encoder.sparse_tokens.grad.abs().sum() > 0


def test_compiled_without_graph_breaks_and_output_survives(encoder):
    torch._dynamo.reset()
    images = torch.rand(2, 3, 40, 24)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")(images)
    assert isinstance(compiled, StellarOutput)
    assert compiled.grid == (5, 3)
    assert_alike(compiled.lowrank, encoder(images).lowrank)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(1, 3, 32, 32)], "views must be ViewBatch but one is Tensor"),
        (np.zeros((1, 3, 32, 32)), "a tensor of images or a list of ViewBatch, not ndarray"),
    ],
)
def test_what_is_no_view_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        StellarEncoder("tiny")(images)


def test_gradients_by_torch_func():
    torch.manual_seed(0)
    encoder, image = StellarEncoder("tiny"), torch.rand(1, 3, 32, 32)
    parameters = dict(encoder.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(encoder, parameters, (image,)).lowrank.square().sum()

    grads = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for (name, found), want in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-6, msg=name)
