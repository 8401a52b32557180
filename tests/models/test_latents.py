"""Edited tokens: what an edit changes, what it leaves alone, and what the decoder makes of it."""

import dataclasses

import pytest
import torch

from stellar_fast import StellarModel, StellarOutput, VQGANConfig, blend_tokens, drop_tokens, swap_tokens
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS
from tests.roundings import assert_alike

VQGAN = VQGANConfig((1, 1, 1, 2), 4, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)


@pytest.fixture(params=[None, VQGAN], ids=["pixels", "codes"])
def model(request: pytest.FixtureRequest) -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(SMALL_ENCODER, SMALL_DECODER, vq_model=request.param, **SMALL_KWARGS).eval()


def photos(seed: int, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def image(model: StellarModel, features) -> torch.Tensor:
    return model.reconstruct(features)["reconstruction"]


def consistent(features: StellarOutput) -> None:
    assert_alike(features.lowrank, features.spatial @ features.sparse)
    assert_alike(features.peak_dist, features.spatial.amax(dim=1))


def test_dropping_takes_one_term_out_of_the_sum(model: StellarModel) -> None:
    a = model.encode(photos(0))
    b = drop_tokens(a, 2)
    assert isinstance(b, StellarOutput) and b.grid == (4, 5)
    assert_alike(b.lowrank, a.lowrank - a.spatial[..., 2:3] * a.sparse[:, 2:3])
    others = [0, 1, 3]
    assert torch.equal(b.sparse[:, others], a.sparse[:, others])
    assert torch.equal(b.spatial[..., others], a.spatial[..., others])
    assert b.dense is a.dense and b.cls is a.cls
    consistent(b)
    assert not torch.equal(model.decoder(b.sparse, b.spatial, b.grid)[0], model.decoder(a.sparse, a.spatial, a.grid)[0])


def test_a_dropped_token_has_no_influence(model: StellarModel) -> None:
    a = model.encode(photos(0))
    sparse, spatial = a.sparse.clone(), a.spatial.clone()
    sparse[:, 1], spatial[..., 1] = float("nan"), 5.0
    other = dataclasses.replace(a, sparse=sparse, spatial=spatial)
    assert torch.equal(image(model, drop_tokens(a, 1)), image(model, drop_tokens(other, 1)))
    fewer = {"sparse": a.sparse[:, [0, 2, 3]], "spatial": a.spatial[..., [0, 2, 3]]}  # as if it had never been there
    without = model.reconstruct(fewer, grid=a.grid)["reconstruction"]
    assert_alike(image(model, drop_tokens(a, 1)), without)


def test_drops_add_up_and_none_is_left_at_the_end(model: StellarModel) -> None:
    a = model.encode(photos(0))
    both = drop_tokens(a, (0, 3))
    for name in ("sparse", "spatial", "lowrank", "peak_dist", "concat"):
        assert torch.equal(both[name], drop_tokens(drop_tokens(a, 3), torch.tensor(0))[name])
    empty = drop_tokens(a, range(4))
    assert not empty.lowrank.any()
    assert torch.equal(image(model, empty)[0], image(model, empty)[1])
    nothing = drop_tokens(a, [])
    assert torch.equal(nothing.sparse, a.sparse) and torch.equal(nothing.spatial, a.spatial)


def test_a_mask_drops_other_tokens_of_each_image(model: StellarModel) -> None:
    a = model.encode(photos(0))
    mask = torch.tensor([[True, False, False, False], [False, False, True, True]])
    b = drop_tokens(a, mask)
    for i, tokens in enumerate((0, [2, 3])):
        expected = drop_tokens(a, tokens)
        assert torch.equal(b.sparse[i], expected.sparse[i]) and torch.equal(b.spatial[i], expected.spatial[i])


def test_swapping_takes_the_content_and_leaves_the_places(model: StellarModel) -> None:
    a, b = model.encode(photos(0)), model.encode(photos(1, 24, 24))  # the other image may have another size
    c = swap_tokens(a, b, [1, 2])
    assert torch.equal(c.sparse[:, 1:3], b.sparse[:, 1:3]) and torch.equal(c.sparse[:, [0, 3]], a.sparse[:, [0, 3]])
    assert torch.equal(c.spatial, a.spatial) and c.grid == a.grid
    consistent(c)
    expected = model.reconstruct(b.sparse, a.spatial, grid=a.grid)["reconstruction"]
    assert torch.equal(image(model, swap_tokens(a, b)), expected)
    assert torch.equal(swap_tokens(c, a, [1, 2]).sparse, a.sparse)


def test_swapping_with_itself_changes_nothing(model: StellarModel) -> None:
    a = model.encode(photos(0))
    same = swap_tokens(a, a)
    assert torch.equal(same.sparse, a.sparse)
    assert_alike(same.lowrank, a.lowrank)
    assert torch.equal(image(model, same), image(model, a))


def test_blending_goes_from_one_to_the_other(model: StellarModel) -> None:
    a, b = model.encode(photos(0)), model.encode(photos(1))
    assert torch.equal(blend_tokens(a, b, 0).sparse, a.sparse)
    assert torch.equal(blend_tokens(a, b, 1).sparse, b.sparse)
    part = blend_tokens(a, b, 0.25, tokens=3)
    assert_alike(part.sparse[:, 3], 0.75 * a.sparse[:, 3] + 0.25 * b.sparse[:, 3])
    assert torch.equal(part.sparse[:, :3], a.sparse[:, :3]) and torch.equal(part.spatial, a.spatial)
    consistent(part)


def test_a_plain_mapping_stays_one(small_model: StellarModel) -> None:
    a = small_model.encode(photos(0))
    least = {name: a[name] for name in ("sparse", "spatial")}
    assert drop_tokens(least, 0).keys() == least.keys()
    whole = drop_tokens(dict(a), 0)
    assert isinstance(whole, dict) and torch.equal(whole["concat"], drop_tokens(a, 0).concat)


def test_gradients_pass_through_what_is_kept(small_model: StellarModel) -> None:
    a = small_model.encode(photos(0))
    sparse = a.sparse.clone().requires_grad_()
    drop_tokens(dataclasses.replace(a, sparse=sparse), 1).lowrank.sum().backward()
    expected = a.spatial.sum(dim=1)[..., None].repeat(1, 1, 48)
    expected[:, 1] = 0
    assert_alike(sparse.grad, expected)


def test_reduced_precision_keeps_its_dtypes(small_model: StellarModel) -> None:
    a = small_model.to(torch.bfloat16).encode(photos(0))
    b = blend_tokens(drop_tokens(a, 1), a, 0.5)
    assert [t.dtype for t in b.values()] == [t.dtype for t in a.values()]


def test_wrong_edits_are_named(small_model: StellarModel) -> None:
    a = small_model.encode(photos(0))
    with pytest.raises(ValueError, match="there is no token 4: the features have 4 tokens, 0 to 3"):
        drop_tokens(a, [0, 4])
    with pytest.raises(ValueError, match="there is no token -1"):
        drop_tokens(a, -1)
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 5\) but the features have \(2, 4\) tokens"):
        drop_tokens(a, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"features need 'sparse' and 'spatial' but have 'sparse'"):
        drop_tokens({"sparse": a.sparse}, 0)
    with pytest.raises(ValueError, match=r"sparse \(2, 4, 48\) and spatial \(2, 4, 20\) are not"):
        drop_tokens({"sparse": a.sparse, "spatial": a.spatial.mT}, 0)
    with pytest.raises(ValueError, match=r"a has sparse tokens \(2, 4, 48\) but b has \(1, 4, 48\)"):
        swap_tokens(a, {"sparse": a.sparse[:1]})
    with pytest.raises(ValueError, match="b needs 'sparse' but has 'spatial'"):
        swap_tokens(a, {"spatial": a.spatial})
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\] but is 1.5"):
        blend_tokens(a, a, 1.5)
