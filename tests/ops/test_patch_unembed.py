import itertools

import pytest
import torch
import torch.nn.functional as F

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.patch_unembed import reference
from stellar_fast.kernels.patch_unembed.spec import SPEC
from stellar_fast.nn.patch_unembed import PatchUnembed
from stellar_fast.ops import patch_unembed
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory
from tests.roundings import assert_alike

SIZES = {"B": 2, "Y": 3, "X": 4, "H": 24, "C": 3, "S": 8}


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: int) -> dict:
    return SPEC.make_inputs(SIZES | sizes, dtype, torch.device(device), torch.Generator().manual_seed(1))


@each_backend("patch_unembed")
@each_dtype("patch_unembed")
@each_shape("patch_unembed")
def test_no_worse_than_eager(backend, device, shape, dtype):
    if backend == "cpu" and dtype == torch.float16:
        with use_backend(patch_unembed="cpu"), pytest.raises(ValueError, match=r"does not compute in torch\.float16"):
            check_op("patch_unembed", backend, shape, dtype, device)
        return
    check_op("patch_unembed", backend, shape, dtype, device)


@each_backend("patch_unembed")
def test_registration(backend, device):
    check_registered("patch_unembed", backend, device=device)


@each_backend("patch_unembed")
def test_without_bias(backend, device):
    check_op("patch_unembed", backend, device=device, bias=None)
    check_registered("patch_unembed", backend, device=device, bias=None)


@each_backend("patch_unembed", "cuda", "cpu")
@pytest.mark.parametrize("side", [*range(1, 9), 12, 13, 15, 16, 17, 33])
def test_every_pixel_has_its_place(backend, device, side):
    """With numbers that fp32 and bf16 add exactly, at sides that vectors divide and that they do not."""
    Y, X, C = 2, 3, 5 if side < 10 else 2
    for dtype, B in itertools.product((torch.float32, torch.bfloat16), (1, 2)):
        patches = torch.randint(-60, 60, (B, Y, X, C, side, side), generator=torch.Generator().manual_seed(side))
        image = patches.permute(0, 3, 1, 4, 2, 5).reshape(B, C, Y * side, X * side)
        H = C * side**2
        eye = torch.eye(H, dtype=dtype, device=device).view(H, C, side, side)
        x = patches.view(B, Y * X, H).to(device, dtype).requires_grad_()
        bias = torch.arange(C, device=device).to(dtype).requires_grad_()
        with use_backend(patch_unembed=backend), poisoned_memory():
            out = patch_unembed(x, eye, bias, side, (Y, X))
            out.backward(image.to(device, dtype))
        assert out.is_contiguous()
        assert torch.equal(out.cpu().long(), image + torch.arange(C)[:, None, None])
        assert torch.equal(x.grad, x)
        assert torch.equal(bias.grad.cpu(), image.sum((0, 2, 3)).to(dtype))


@each_backend("patch_unembed", "cuda", "cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_transposed_convolution(backend, device, dtype):
    arguments = inputs(dtype, device)
    x, weight, bias = (arguments[name].requires_grad_() for name in ("x", "weight", "bias"))
    want = F.conv_transpose2d(x.mT.unflatten(2, (3, 4)), weight, bias, stride=8)
    along = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    with use_backend(patch_unembed=backend):
        out = patch_unembed(**arguments)
        grads = torch.autograd.grad(out, (x, weight, bias), along)
    assert_alike((out, *grads), (want, *torch.autograd.grad(want, (x, weight, bias), along)))


@each_backend("patch_unembed", "cuda", "cpu")
def test_addresses_that_vectors_do_not_divide(backend, device):
    """A gradient that is contiguous, but one element off."""
    arguments = inputs(torch.bfloat16, device)
    x = arguments["x"].requires_grad_()
    with use_backend(patch_unembed=backend):
        out = patch_unembed(**arguments)
        along = torch.randn(out.numel() + 1, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)[1:]
        (want,) = torch.autograd.grad(out, x, along.clone().view(out.shape), retain_graph=True)
        (found,) = torch.autograd.grad(out, x, along.view(out.shape))
    assert torch.equal(found, want)


@each_backend("patch_unembed", "cpu")
def test_any_number_of_threads_finds_the_same(backend, device):
    arguments = inputs(device=device, B=5)
    bias = arguments["bias"].requires_grad_()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5, 20):
            torch.set_num_threads(threads)
            with use_backend(patch_unembed=backend):
                out = patch_unembed(**arguments)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), bias)))
    finally:
        torch.set_num_threads(before)
    for out, grad in found:
        assert_alike(out, found[0][0])  # the product is oneDNN's
        assert_alike(grad, found[0][1])


@each_backend("patch_unembed")
def test_under_autocast_it_computes_in_its_dtype(backend, device):
    arguments = inputs(device=device)
    weight = arguments["weight"].requires_grad_()
    with use_backend(patch_unembed=backend), torch.autocast(device, torch.bfloat16):
        out = patch_unembed(**arguments)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), weight)
    assert grad.dtype == torch.float32
    exact = reference.patch_unembed(*arguments.values())
    assert_alike(out, exact.bfloat16())


def test_which_backend_takes_what():
    with backend.observe() as seen:
        patch_unembed(**inputs(H=512))
    assert seen == {("patch_unembed", "cpu")}
    with backend.observe() as seen:
        patch_unembed(**inputs())
    assert not seen, "a small product"
    with backend.observe() as seen:
        half, double = (patch_unembed(**inputs(dtype, H=512)) for dtype in (torch.float16, torch.float64))
    assert not seen and half.dtype == torch.float16 and double.dtype == torch.float64
    assert half.is_contiguous() and double.is_contiguous()
    assert_alike(half, double.half())


def test_forward_mode_is_not_silently_zero():
    arguments = inputs()
    along = arguments["x"].flip(0)
    _, tangent = torch.func.jvp(lambda x: patch_unembed(**(arguments | {"x": x})), (arguments["x"],), (along,))
    want = patch_unembed(**(arguments | {"x": along, "bias": None}))
    assert_alike(tangent, want)


def test_the_module_has_a_convolutions_parameters():
    torch.manual_seed(0)
    ours = PatchUnembed(24, 3, 8)
    torch.manual_seed(0)
    theirs = torch.nn.ConvTranspose2d(24, 3, 8, 8)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight", "bias"}
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = inputs()["x"]
    assert_alike(ours(x, (4, 3)), theirs(x.mT.unflatten(2, (4, 3))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (3, 5)}, "a grid of 3 x 5 patches has 15 but x has 12"),
        ({"patch_size": 4}, "patch_size is 4 but weight has patches of 8"),
        ({"x": torch.zeros(2, 12, 20)}, "weight has H=24 but x has H=20"),
        ({"x": torch.zeros(24, 12)}, r"x must have 3 dimensions \(BPH\) but its shape is \(24, 12\)"),
        ({"weight": torch.zeros(24, 3, 8, 4)}, "weight has S=4 but weight has S=8"),
        ({"bias": torch.zeros(4)}, "bias has C=4 but weight has C=3"),
        ({"grid": (-3, -4)}, "rows must be positive but is -3"),
        ({"weight": torch.zeros(24, 0, 8, 8), "bias": None}, "C must be positive but is 0"),
        ({"x": torch.zeros(2, 12, 24, dtype=torch.int64)}, "x must be floating point but is torch.int64"),
        (
            {"bias": torch.zeros(3, dtype=torch.bfloat16)},
            "must have one dtype but have torch.bfloat16 and torch.float32",
        ),
    ],
)
def test_wrong_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        patch_unembed(**(inputs() | changed))
