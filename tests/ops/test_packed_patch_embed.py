"""packed_patch_embed: full, masked, resized and uint8 views in one packed buffer."""

import pytest
import torch
import torch.nn.functional as F

from stellar_fast.ops import packed_patch_embed
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def arguments(sides=((8, 8),), width=6, patch=4, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "images": [torch.rand(2, 3, *side, generator=generator).to(dtype) for side in sides],
        "weight": randn(width, 3, patch, patch),
        "bias": randn(width),
        "positions": [randn(1 + (h // patch) * (w // patch), width) for h, w in sides],
        "cls_token": randn(width),
        "sparse_tokens": randn(3, width),
        "mean": MEAN.to(dtype),
        "std": STD.to(dtype),
    }


@each_backend("packed_patch_embed", "torch", "reference")
@each_dtype("packed_patch_embed")
@each_shape("packed_patch_embed")
def test_no_worse_than_eager(backend, device, dtype, shape):
    check_op("packed_patch_embed", backend, shape, dtype, device)


@each_backend("packed_patch_embed", "torch", "reference")
def test_registration(backend, device):
    check_registered("packed_patch_embed", backend, device=device)


def test_sequences_are_packed_view_by_view_and_image_by_image():
    inputs = arguments(sides=((8, 8), (9, 12)))
    keep = torch.tensor([[3, 0], [1, 2]])
    packed = packed_patch_embed(**inputs, keep_indices=[keep, None])
    assert packed.shape == (2 * (1 + 2 + 3) + 2 * (1 + 6 + 3), 6)
    masked, full = packed[:12].view(2, 6, 6), packed[12:].view(2, 10, 6)
    for sequence, view, position in ((masked, 0, inputs["positions"][0]), (full, 1, inputs["positions"][1])):
        assert torch.equal(sequence[:, 0], (inputs["cls_token"] + position[0]).expand(2, -1))
        assert torch.equal(sequence[:, -3:], inputs["sparse_tokens"].expand(2, -1, -1))
        pixels = (inputs["images"][view] - MEAN[:, None, None]) / STD[:, None, None]
        patches = F.conv2d(pixels, inputs["weight"], inputs["bias"], stride=4).flatten(2).mT + position[1:]
        expected = patches if view else torch.stack((patches[0, [3, 0]], patches[1, [1, 2]]))
        torch.testing.assert_close(sequence[:, 1:-3], expected)


def test_uint8_is_the_same_image_beside_floats_too():
    inputs = arguments(sides=((8, 8), (8, 8)))
    pixels, floats = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), inputs["images"][1]
    ours = packed_patch_embed(**{**inputs, "images": [pixels, floats]})
    torch.testing.assert_close(ours, packed_patch_embed(**{**inputs, "images": [pixels.float() / 255, floats]}))


def test_dropped_patches_have_no_gradient():
    inputs = arguments()
    image = inputs["images"][0].requires_grad_()
    position = inputs["positions"][0].requires_grad_()
    out = packed_patch_embed(**inputs, keep_indices=[torch.tensor([[0], [3]])])
    out.square().sum().backward()
    assert (image.grad[0, :, :4, :4] != 0).any() and (image.grad[0, :, 4:] == 0).all()
    assert (image.grad[1, :, 4:, 4:] != 0).any() and (image.grad[1, :, :4] == 0).all()
    assert (position.grad[[2, 3]] == 0).all() and (position.grad[[0, 1, 4]] != 0).all()


def test_autocast_projects_in_bf16_and_adds_in_fp32():
    inputs = arguments()
    exact = packed_patch_embed(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_patch_embed(**inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out[:1], exact[:1]) and 0 < (out - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": [torch.zeros(2, 4, 8, 8)]}, r"images must be \(B, 3, H, W\) but has shape \(2, 4, 8, 8\)"),
        ({"images": [torch.full((2, 3, 8, 8), 2.0)]}, r"must lie in \[0, 1\] but span \[2, 2\]"),
        ({"images": []}, "there are 0 images, 1 positions and 0 keep_indices"),
        ({"positions": [torch.zeros(4, 6)]}, r"positions must be \(5, 6\) but has shape \(4, 6\)"),
        ({"bias": torch.zeros(5)}, "bias has D=5 but weight has D=6"),
        ({"std": torch.ones(4)}, "C=4"),
        ({"keep_indices": [torch.zeros(1, 2, dtype=torch.int64)]}, r"keep_indices must be \(2, 1 to 4\) but has shape"),
        (
            {"keep_indices": [torch.zeros(2, 2, dtype=torch.int32)]},
            "keep_indices must be torch.int64 but is torch.int32",
        ),
        ({"keep_indices": [torch.full((2, 1), 4)]}, r"keep_indices span \[4, 4\] but the image has 4 patches"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        packed_patch_embed(**{**arguments(), **changed})
