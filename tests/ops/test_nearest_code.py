import pytest
import torch
from torch import Tensor

from stellar_fast.backend import use_backend
from stellar_fast.kernels.nearest_code import reference
from stellar_fast.ops import nearest_code
from tests.conftest import read_golden
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory

# Around the tiles of the kernels: 12 rows and 64 entries in C++; 64 rows, 128 entries and 16 elements in CUDA.
TILES = ({"N": 12, "E": 16, "S": 64}, {"N": 109, "E": 18, "S": 65}, {"N": 65, "E": 260, "S": 513})


def codes(backend: str, z: Tensor, codebook: Tensor) -> Tensor:
    with use_backend(nearest_code=backend), poisoned_memory():
        return nearest_code(z, codebook).cpu()


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@each_backend("nearest_code")
@each_dtype("nearest_code")
@each_shape("nearest_code", *TILES)
def test_no_worse_than_eager(backend, device, shape, dtype):
    check_op("nearest_code", backend, shape, dtype, device)


@each_backend("nearest_code")
def test_registration(backend, device):
    check_registered("nearest_code", backend, device=device)


@each_backend("nearest_code")
def test_golden(backend, device):
    """The codes of images, by an encoder on the CPU; 2e-4 lies between the nearest two entries of the closest call."""
    case = read_golden("vq")
    vqgan = case.model().tokenizer
    z = vqgan.encoder(case.tensors["input.global_views"][:, 0]).permute(0, 2, 3, 1).flatten(0, 2)
    found = codes(backend, z.to(device), vqgan.quantize.embedding.weight.to(device))
    assert torch.equal(found.view(2, -1), case.tensors["train.vq_codes"])


@each_backend("nearest_code")
@each_dtype("nearest_code")
@pytest.mark.parametrize(("N", "E", "S"), [(40, 3, 9), (70, 5, 130), (33, 4, 1000)])
def test_ties_take_the_lowest_index(backend, device, dtype, N, E, S):
    """Small integers, whose distances are exact in fp32: many entries are equally near, some are equal."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = (torch.randint(-2, 3, (rows, E), generator=generator).to(dtype) for rows in (N, S))
    distance = (z.double()[:, None] - codebook.double()).square().sum(-1)
    assert ((distance == distance.amin(1, keepdim=True)).sum(1) > 1).any()
    assert torch.equal(codes(backend, z.to(device), codebook.to(device)), distance.argmin(1))


@each_backend("nearest_code", "cpu", "cuda")
@pytest.mark.parametrize("E", [7, 64, 200])
def test_equal_entries_tie_to_the_last_bit(backend, device, E):
    """Wherever they stand in the tiles; the codebook is the same entries five times, the last time in part."""
    z, entries = drawn(90, E).to(device), drawn(77, E, seed=1).to(device)
    codebook = entries.repeat(5, 1)[:350]
    assert codes(backend, z, codebook).max() < 77
    assert torch.equal(codes(backend, z, codebook), codes(backend, z, entries))
    assert torch.equal(codes(backend, z, entries[:1].expand(350, -1)), torch.zeros(90, dtype=torch.int64))


@each_backend("nearest_code")
@pytest.mark.parametrize("S", [1, 20, 300])
def test_values_that_are_not_finite(backend, device, S):
    """NaN is the smallest for torch.argmin, and infinity less infinity is one."""
    z, codebook = drawn(60, 24), drawn(S, 24, seed=1)
    z[3, 5], z[10] = torch.nan, torch.nan
    z[20, 7], z[21, 0], z[22, 1:3] = torch.inf, -torch.inf, torch.tensor([torch.inf, -torch.inf])
    for value in (0.0, torch.inf, -torch.inf, torch.nan):
        for entry in (S // 2, S - 1):
            codebook[entry, 4] = value
        want = reference.nearest_code(z, codebook)
        assert want[3] == 0 and want[10] == 0
        assert torch.equal(codes(backend, z.to(device), codebook.to(device)), want)
    assert (want == S // 2).sum() > 50 or S == 1


@each_backend("nearest_code")
def test_dtypes_may_differ(backend, device):
    """As under autocast, which leaves the codebook in fp32."""
    z, codebook = drawn(50, 24).bfloat16().to(device), drawn(30, 24, seed=1).to(device)
    want = codes("reference", z.double().cpu(), codebook.double().cpu())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(codes(backend, z, codebook), want)
    assert torch.equal(codes(backend, z.to(codebook), codebook.bfloat16()), codes("reference", z, codebook.bfloat16()))
    assert torch.equal(nearest_code(z.double(), codebook).cpu(), want)


@each_backend("nearest_code")
def test_strides_of_zero_and_images(backend, device):
    """One vector for all rows, and the channels of an image, whose pixels are its rows."""
    z, codebook = drawn(1, 24).to(device), drawn(30, 24, seed=1).to(device)
    one = codes("reference", z, codebook)
    assert torch.equal(codes(backend, z.expand(100, -1), codebook), one.expand(100))
    image = drawn(2, 24, 5, 7).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = image.contiguous(memory_format=layout).permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(codes(backend, pixels, codebook), codes("reference", pixels, codebook))


def test_no_gradient_and_transforms():
    z, codebook = drawn(6, 9, 7), drawn(20, 7, seed=1).requires_grad_()
    want = torch.stack([nearest_code(part, codebook) for part in z])
    assert not want.requires_grad
    assert torch.equal(torch.func.vmap(nearest_code, (0, None))(z, codebook), want)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="codebook has E=6 but z has E=7"):
        nearest_code(torch.zeros(3, 7), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"codebook must be floating point but is torch\.int64"):
        nearest_code(torch.zeros(3, 7), torch.zeros(4, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="S must be positive but is 0"):
        nearest_code(torch.zeros(3, 7), torch.zeros(0, 7))
    with use_backend(nearest_code="cpu"), pytest.raises(ValueError, match=r"it does not compute in torch\.float64"):
        nearest_code(torch.zeros(3, 7).double(), torch.zeros(4, 7))
