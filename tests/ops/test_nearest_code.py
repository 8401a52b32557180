import pytest
import torch

from stellar_fast.ops import nearest_code


def test_nearest_and_ties():
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(50, 7, generator=generator), torch.randn(20, 7, generator=generator)
    expected = (z.double()[:, None] - codebook.double()).square().sum(-1).argmin(1)
    assert torch.equal(nearest_code(z, codebook), expected)
    assert torch.equal(nearest_code(z, codebook[:1].expand(4, -1)), torch.zeros(50, dtype=torch.int64))
    assert nearest_code(z[:0], codebook).shape == (0,)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="codebook has E=6 but z has E=7"):
        nearest_code(torch.zeros(3, 7), torch.zeros(4, 6))
