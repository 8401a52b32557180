import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.nn.masking import block_focus, gaussian_focus, random_keep_indices
from tests.conftest import mismatches


def test_golden_gaussian(golden_ops):
    part = {
        name.removeprefix("mask.gaussian."): t for name, t in golden_ops.items() if name.startswith("mask.gaussian.")
    }
    centre = torch.cat((part["centre_y"], part["centre_x"]), dim=1)
    noise = gaussian_focus(part["noise_in"], (14, 14), centre, 14 * part["sigma_as_share_of_side"])
    assert mismatches({"noise": noise}, {"noise": part["noise_out"]}) == []


def test_golden_block(golden_ops):
    noise = block_focus(golden_ops["mask.block.noise_in"], (14, 14), golden_ops["mask.block.top_left"], math.isqrt(39))
    assert torch.equal(noise, golden_ops["mask.block.noise_out"])


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    ratio=st.floats(0, 0.95),
    mode=st.sampled_from(["gaussian", "block", None]),
    seed=st.integers(0, 5),
)
def test_exactly_the_asked_number_of_different_patches_stays(grid, ratio, mode, seed):
    P = grid[0] * grid[1]
    kept = int(P * (1 - ratio))
    generator = torch.Generator().manual_seed(seed)
    if kept < 1:
        with pytest.raises(ValueError, match="keeps none of"):
            random_keep_indices(3, grid, ratio, focal_mode=mode, generator=generator)
        return
    indices = random_keep_indices(3, grid, ratio, focal_mode=mode, generator=generator)
    assert indices.shape == (3, kept)
    assert (indices[:, 1:] > indices[:, :-1]).all(), "ascending, so no patch twice"
    assert 0 <= indices.min() <= indices.max() < P


def spread(indices: torch.Tensor, side: int) -> torch.Tensor:
    """Mean squared distance of the kept patches from their centre, per view."""
    places = torch.stack((indices // side, indices % side), dim=-1).float()
    return (places - places.mean(1, keepdim=True)).square().sum(-1).mean(1)


def test_focus_gathers_the_visible_patches():
    def draw(mode, probability):
        generator = torch.Generator().manual_seed(0)
        return random_keep_indices(
            400, (14, 14), 0.8, focal_mode=mode, focal_probability=probability, generator=generator
        )

    unfocused = spread(draw(None, None), 14).mean()
    assert spread(draw("gaussian", 1.0), 14).mean() < 0.7 * unfocused
    block = draw("block", None)
    rows, columns = block // 14, block % 14
    # every view is focused by default: its 6x6 square of zeros is wholly visible
    squares = [
        {(r + y, c + x) for y in range(6) for x in range(6)} for r in range(9) for c in range(9)
    ]  # fmt: skip
    views = [set(zip(r.tolist(), c.tolist(), strict=True)) for r, c in zip(rows[:50], columns[:50], strict=True)]
    assert all(any(square <= view for square in squares) for view in views)
    half = spread(draw("gaussian", None), 14).mean()
    assert spread(draw("gaussian", 1.0), 14).mean() < half < unfocused
    assert torch.equal(draw("gaussian", 0.0), draw("gaussian", 0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focal_mode": "ring"}, "focal_mode must be one of"),
        ({"masking_ratio": 1.0}, r"masking_ratio must be in \[0, 1\) but is 1.0"),
        ({"masking_ratio": -0.1}, r"masking_ratio must be in \[0, 1\) but is -0.1"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_keep_indices(2, (4, 4), **{"masking_ratio": 0.5, **arguments})
