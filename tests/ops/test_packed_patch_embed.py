"""packed_patch_embed: full, masked, resized and uint8 views in one packed buffer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from stellar_fast.backend import use_backend
from stellar_fast.ops import packed_patch_embed
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape
from tests.roundings import assert_alike

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
DOUBLE = (torch.float64,)


def arguments(sides=((8, 8),), width=6, patch=4, dtype=torch.float32, device="cpu") -> dict:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        "images": [torch.rand(2, 3, *side, generator=generator).to(dtype) for side in sides],
        "weight": randn(width, 3, patch, patch),
        "bias": randn(width),
        "positions": [randn(1 + (h // patch) * (w // patch), width) for h, w in sides],
        "cls_token": randn(width),
        "sparse_tokens": randn(3, width),
        "mean": MEAN.to(dtype),
        "std": STD.to(dtype),
    }
    return move(inputs, device)


def move(inputs: dict, *to) -> dict:
    """Tensors on a device, or those of a floating-point dtype in another."""
    return tree_map(
        lambda x: x.to(*to) if isinstance(x, Tensor) and (to != DOUBLE or x.is_floating_point()) else x, inputs
    )


def with_gradients(backend: str, inputs: dict) -> dict[str, Tensor]:
    """The output, and the gradient of everything that is learnt."""
    learnt = {name: inputs[name].detach().requires_grad_() for name in ("weight", "bias", "cls_token", "sparse_tokens")}
    positions = [position.detach().requires_grad_() for position in inputs["positions"]]
    with use_backend(packed_patch_embed=backend):
        out = packed_patch_embed(**{**inputs, **learnt, "positions": positions})
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    names = [*learnt, *(f"position {i}" for i in range(len(positions)))]
    return dict(
        zip(names, torch.autograd.grad(out, [*learnt.values(), *positions], along), strict=True), out=out.detach()
    )


def assert_as_exact(backend: str, inputs: dict) -> None:
    exact = with_gradients("reference", move(inputs, *DOUBLE))
    for name, ours in with_gradients(backend, inputs).items():
        assert_alike(ours, exact[name].to(ours.dtype))


@each_backend("packed_patch_embed")
@each_dtype("packed_patch_embed")
@each_shape("packed_patch_embed")
def test_no_worse_than_eager(backend, device, dtype, shape):
    check_op("packed_patch_embed", backend, shape, dtype, device)


@each_backend("packed_patch_embed")
def test_registration(backend, device):
    check_registered("packed_patch_embed", backend, device=device)


@each_backend("packed_patch_embed")
def test_sequences_are_packed_view_by_view_and_image_by_image(backend, device):
    inputs = arguments(sides=((8, 8), (9, 12)))
    keep = torch.tensor([[3, 0], [1, 2]])
    with use_backend(packed_patch_embed=backend):
        packed = packed_patch_embed(**move(inputs | {"keep_indices": [keep, None]}, device)).cpu()
    assert packed.shape == (2 * (1 + 2 + 3) + 2 * (1 + 6 + 3), 6)
    masked, full = packed[:12].view(2, 6, 6), packed[12:].view(2, 10, 6)
    for sequence, view, position in ((masked, 0, inputs["positions"][0]), (full, 1, inputs["positions"][1])):
        assert torch.equal(sequence[:, 0], (inputs["cls_token"] + position[0]).expand(2, -1))
        assert torch.equal(sequence[:, -3:], inputs["sparse_tokens"].expand(2, -1, -1))
        pixels = (inputs["images"][view] - MEAN[:, None, None]) / STD[:, None, None]
        patches = F.conv2d(pixels, inputs["weight"], inputs["bias"], stride=4).flatten(2).mT + position[1:]
        expected = patches if view else torch.stack((patches[0, [3, 0]], patches[1, [1, 2]]))
        assert_alike(sequence[:, 1:-3], expected)


@each_backend("packed_patch_embed")
def test_uint8_is_the_same_image_beside_floats_too(backend, device):
    inputs = arguments(sides=((8, 8), (8, 8)), device=device)
    floats = inputs["images"][1]
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, device=device)
    with use_backend(packed_patch_embed=backend):
        ours = packed_patch_embed(**{**inputs, "images": [pixels, floats]})
        as_float = packed_patch_embed(**{**inputs, "images": [pixels.float() / 255, floats]})
    assert_alike(ours, as_float)


@each_backend("packed_patch_embed")
def test_every_gradient_of_views_of_all_kinds(backend, device):
    inputs = arguments(sides=((8, 8), (10, 13), (8, 12)), width=33, device=device)
    trained = inputs["positions"][0]
    resized = F.interpolate(trained[1:].T.reshape(1, 33, 2, 2), (2, 3), mode="bicubic").flatten(2)[0].T
    inputs["positions"][1:] = [torch.cat((trained[:1], resized))] * 2
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, device=device)
    last = inputs["images"][2].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # colours innermost
    inputs["images"] = [pixels, inputs["images"][1], last]
    # a patch twice in an image, one in both images, one in none; indices that are a slice of others
    keep = torch.tensor([[3, 1, 3, 0], [3, 0, 2, 1]], device=device)[:, :3]
    assert_as_exact(backend, inputs | {"keep_indices": [keep, None, torch.tensor([[5], [0]], device=device)]})


@each_backend("packed_patch_embed")
def test_patches_need_not_be_square_nor_images_dense(backend, device):
    inputs = arguments(sides=((8, 18),), width=17, device=device)
    weight = torch.randn(17, 3, 4, 3, generator=torch.Generator().manual_seed(2)).to(device)
    wide = torch.rand(2, 3, 8, 40, generator=torch.Generator().manual_seed(3)).to(device)
    position = torch.randn(1 + 12, 17, generator=torch.Generator().manual_seed(4)).to(device)
    changed = {"weight": weight, "positions": [position], "images": [wide[..., 3:39:2].flip(0)]}
    assert_as_exact(backend, inputs | changed)
    no_sparse_tokens = {
        "sparse_tokens": inputs["sparse_tokens"][:0],
        "images": [wide[:1, ..., :18].expand(2, -1, -1, -1)],
    }
    assert_as_exact(backend, inputs | changed | no_sparse_tokens)


@each_backend("packed_patch_embed", "triton")
def test_triton_refuses_what_it_has_no_gradient_or_dtype_for(backend, device):
    inputs = arguments(device=device)
    image, mean = inputs["images"][0].clone().requires_grad_(), inputs["mean"].clone().requires_grad_()
    double = move(inputs, *DOUBLE)
    for changed, message in (
        ({"images": [image]}, "it has no gradient of images, mean and std"),
        ({"mean": mean}, "it has no gradient of images, mean and std"),
        ({"images": double["images"]}, "it does not compute in torch.float64"),
        (double, "it does not compute in torch.float64"),
    ):
        with use_backend(packed_patch_embed=backend), pytest.raises(ValueError, match=message):
            packed_patch_embed(**{**inputs, **changed})
    with use_backend(packed_patch_embed=backend), torch.no_grad():
        assert torch.equal(packed_patch_embed(**{**inputs, "images": [image]}), packed_patch_embed(**inputs))
    asked, refused = (
        use_backend(packed_patch_embed=backend),
        pytest.raises(ValueError, match="no forward-mode derivative"),
    )
    with asked, torch.autograd.forward_ad.dual_level(), refused:
        packed_patch_embed(**inputs)
    packed_patch_embed(**{**inputs, "images": [image]}).sum().backward()
    assert image.grad is not None


def test_dropped_patches_have_no_gradient():
    inputs = arguments()
    image = inputs["images"][0].requires_grad_()
    position = inputs["positions"][0].requires_grad_()
    out = packed_patch_embed(**inputs, keep_indices=[torch.tensor([[0], [3]])])
    out.square().sum().backward()
    assert (image.grad[0, :, :4, :4] != 0).any() and (image.grad[0, :, 4:] == 0).all()
    assert (image.grad[1, :, 4:, 4:] != 0).any() and (image.grad[1, :, :4] == 0).all()
    assert (position.grad[[2, 3]] == 0).all() and (position.grad[[0, 1, 4]] != 0).all()


@each_backend("packed_patch_embed", "torch", "triton")
def test_autocast_projects_in_bf16_and_adds_in_fp32(backend, device):
    inputs = arguments(device=device)
    exact = with_gradients(backend, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = with_gradients(backend, inputs)
    for name, ours in found.items():
        error, largest = (ours - exact[name]).abs().max(), exact[name].abs().max()
        assert ours.dtype == torch.float32, name
        assert (error > 0) == (name in ("out", "weight")) or name == "bias", name
        assert error < 0.01 * largest, name
    assert torch.equal(found["out"][:1], exact["out"][:1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": [torch.zeros(2, 4, 8, 8)]}, r"images must be \(B, 3, H, W\) but has shape \(2, 4, 8, 8\)"),
        ({"images": [torch.full((2, 3, 8, 8), 2.0)]}, r"must lie in \[0, 1\] but span \[2, 2\]"),
        ({"images": [torch.zeros(2, 3, 8, 8, device="meta")]}, "images is on meta but weight is on cpu"),
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
