import pytest
import torch

from stellar_fast.nn.fourier_position import FourierPosition
from tests.conftest import mismatches


def test_golden(golden_ops):
    position = FourierPosition(64)
    position.gaussian_matrix.copy_(golden_ops["posenc.gaussian"])
    have = position((14, 14)).T.unflatten(1, (14, 14))
    assert mismatches({"out": have}, {"out": golden_ops["posenc.out_14x14x64"]}) == []


def test_rows_and_columns_of_a_grid_that_is_not_square():
    position = FourierPosition(8)
    code = position((2, 3)).unflatten(0, (2, 3))
    x, y = 2 * (2 + 0.5) / 3 - 1, 2 * (0 + 0.5) / 2 - 1
    angle = 2 * torch.pi * (x * position.gaussian_matrix[0] + y * position.gaussian_matrix[1])
    torch.testing.assert_close(code[0, 2, 0::2], angle.sin())
    torch.testing.assert_close(code[0, 2, 1::2], angle.cos())


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even but is 7"):
        FourierPosition(7)
