import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.token_match.reference import transport_plan
from stellar_fast.kernels.token_match.spec import SPEC
from stellar_fast.ops import token_match
from tests.conftest import mismatches
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape, poisoned_memory


def inputs(**shape: int) -> dict[str, torch.Tensor]:
    return SPEC.make_inputs(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1))


@each_backend("token_match")
@each_dtype("token_match")
@each_shape("token_match")
def test_no_worse_than_eager(backend, device, shape, dtype):
    if backend == "cpu" and dtype == torch.float16:
        with use_backend(token_match="cpu"), pytest.raises(ValueError, match=r"does not compute in torch\.float16"):
            check_op("token_match", backend, shape, dtype, device)
        return
    check_op("token_match", backend, shape, dtype, device, return_plan=True)


@each_backend("token_match")
def test_registration(backend, device):
    check_registered("token_match", backend, device=device)
    check_registered("token_match", backend, device=device, return_plan=True)


@each_backend("token_match")
@pytest.mark.parametrize("K", [5, 16, 33])
def test_filtered_targets_cost_twice_the_largest_of_the_batch(backend, device, K):
    """The largest is in another image than most of the filtered ones, and in its last view."""
    tensors = inputs(B=3, V=2, K=K, D=6)
    tensors["pred"][1, 1] *= 3
    keep = torch.rand(3, K, generator=torch.Generator().manual_seed(2)) < 0.7
    keep[0], keep[0, K // 2] = False, True  # one target is left for all
    for filter in (keep, keep.float(), keep.long()):
        check_op(
            "token_match",
            backend,
            device=device,
            return_plan=True,
            filter=filter.to(device),
            **{name: x.to(device) for name, x in tensors.items()},
        )


@each_backend("token_match")
def test_nearly_equal_tokens_far_from_the_origin(backend, device):
    """What a^2 + b^2 - 2 a b loses: distances of 0.01 to 0.3 between tokens of length 280."""
    tensors = inputs(B=2, V=2, K=24, D=96)
    centre, spread = 10 * torch.ones(96), torch.linspace(1e-3, 3e-2, 24)[:, None]
    tensors = {name: (centre + spread * x).to(device) for name, x in tensors.items()}
    check_op("token_match", backend, "small", device=device, return_plan=True, **tensors)


@each_backend("token_match")
def test_golden(backend, device, golden_ops):
    pred, target, keep = (golden_ops[f"match.{name}"].to(device) for name in ("pred", "target", "filter"))
    found = {}
    for name, filter in (("", None), ("_filtered", keep)):
        with use_backend(token_match=backend):
            index, plan = token_match(pred[:, None], target, filter=filter, return_plan=True)
        assert torch.equal(index[:, 0].cpu(), golden_ops[f"match.index{name}"])
        found[f"plan{name}"] = plan[:, 0].cpu()
    assert mismatches(found, {name: golden_ops[f"match.{name}"] for name in found}) == []


def test_golden_reference_without_views(golden_ops):
    pred, target, keep = (golden_ops[f"match.{name}"] for name in ("pred", "target", "filter"))
    plans = {"plan": transport_plan(pred, target), "plan_filtered": transport_plan(pred, target, keep)}
    assert mismatches(plans, {name: golden_ops[f"match.{name}"] for name in plans}) == []


@settings(deadline=None, max_examples=40)
@given(B=st.integers(1, 3), V=st.integers(1, 3), K=st.integers(1, 20), D=st.integers(2, 9), seed=st.integers(0, 20))
def test_equivariant_to_permutations_of_the_targets(B, V, K, D, seed):
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(B, V, K, D, generator=generator), torch.randn(B, K, D, generator=generator)
    order = torch.randperm(K, generator=generator)
    index, permuted = token_match(pred, target), token_match(pred, target[:, order])
    assert torch.equal(order[permuted], index)


@each_backend("token_match")
def test_copies_find_themselves_and_ties_take_the_lowest(backend, device):
    with use_backend(token_match=backend):
        target = 3 * torch.eye(6, device=device)[None]
        order = torch.tensor([3, 1, 0, 5, 4, 2], device=device)
        assert torch.equal(token_match(target[:, None, order], target)[0, 0], order)
        for K in (4, 17, 64):
            same = torch.ones(1, K, 5, device=device)
            assert not token_match(same[:, None], same).any()
        # every target twice: the first of the two, wherever in the tiles of a kernel they are
        tensors = {name: x.to(device) for name, x in inputs(B=1, V=2, K=19, D=37).items()}
        twice = torch.cat([tensors["target"], tensors["target"]], 1)
        pred = torch.cat([tensors["pred"], tensors["pred"].flip(2)], 2)
        index = token_match(pred, twice)
        assert index.max() < 19
        assert torch.equal(index[:, :, :19], index[:, :, 19:].flip(2))


@each_backend("token_match")
def test_every_view_is_matched_to_its_own_image(backend, device):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 5, 4, generator=generator).to(device)
    pred = torch.stack([target[:, torch.randperm(5, generator=generator)] for _ in range(2)], dim=1)
    with use_backend(token_match=backend):
        alone = torch.stack([token_match(pred[b : b + 1], target[b : b + 1])[0] for b in range(3)])
        assert torch.equal(token_match(pred, target), alone)
        by_view = pred.transpose(0, 1).contiguous()  # stored view by view
        assert torch.equal(token_match(by_view.transpose(0, 1), target), alone)
        one_target = target[:1].expand(3, 5, 4)  # of stride 0
        assert torch.equal(token_match(pred, one_target), token_match(pred, one_target.contiguous()))


@each_backend("token_match")
def test_nothing_to_match(backend, device):
    with use_backend(token_match=backend), poisoned_memory():
        for B, V in ((0, 2), (2, 0)):
            index, plan = token_match(
                torch.zeros(B, V, 5, 4, device=device), torch.zeros(B, 5, 4, device=device), return_plan=True
            )
            assert index.shape == (B, V, 5) and index.dtype == torch.int64 and plan.shape == (B, V, 5, 5)
            filter = torch.ones(B, 5, device=device)
            tensors = torch.zeros(B, V, 5, 4, device=device), torch.zeros(B, 5, 4, device=device)
            assert token_match(*tensors, filter=filter).shape == (B, V, 5)


@each_backend("token_match")
def test_the_two_sides_may_have_other_dtypes(backend, device):
    tensors = {name: x.to(device) for name, x in inputs(B=2, V=2, K=5, D=12).items()}
    for halved in tensors:
        mixed = tensors | {halved: tensors[halved].bfloat16()}
        check_op("token_match", backend, "small", device=device, return_plan=True, **mixed)


@each_backend("token_match")
def test_an_index_is_one_even_of_nan(backend, device):
    tensors = {name: x.to(device) for name, x in inputs(B=3, V=2, K=6, D=8).items()}
    with use_backend(token_match=backend):
        want = token_match(**tensors)
        tensors["pred"][1, 0, 2, 3] = torch.nan
        have = token_match(**tensors)
    assert have.min() >= 0 and have.max() < 6
    have[1, 0] = want[1, 0]
    assert torch.equal(have, want), "other views are not touched"


@use_backend(token_match="cpu")
def test_any_number_of_threads_finds_the_same():
    tensors = inputs(B=3, V=3, K=7, D=20)
    filter = torch.arange(21).view(3, 7) % 4 > 0
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5, 20):  # more than there may be cores, and than problems
            torch.set_num_threads(threads)
            found.append(token_match(**tensors, filter=filter, return_plan=True))
    finally:
        torch.set_num_threads(before)
    for index, plan in found[1:]:
        assert torch.equal(index, found[0][0]) and torch.equal(plan, found[0][1])


def test_more_tokens_than_the_kernels_take():
    tensors = inputs(B=1, V=2, K=65, D=8)
    with backend.observe() as seen:
        index = token_match(**tensors)
    assert not seen and index.shape == (1, 2, 65) and index.max() < 65
    with use_backend(token_match="cpu"), pytest.raises(ValueError, match="K 65 is above 64"):
        token_match(**tensors)
    few = {name: x[..., :64, :].double() for name, x in tensors.items()}
    with use_backend(token_match="cpu"), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
        token_match(few["pred"], few["target"].float())
    assert token_match(**few, return_plan=True)[1].dtype == torch.float64


@each_backend("token_match")
def test_there_is_no_gradient(backend, device):
    tensors = {name: x.to(device).requires_grad_() for name, x in inputs(B=1, V=2, K=3, D=4).items()}
    with use_backend(token_match=backend):
        index, plan = token_match(**tensors, return_plan=True)
    assert not index.requires_grad and not plan.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 5, 8)}, "target has K=5 but pred has K=4"),
        ({"filter": torch.zeros(2, 3)}, "filter has K=3 but pred has K=4"),
        ({"epsilon": -1.0}, "epsilon must be positive but is -1.0"),
        ({"iterations": 0}, "iterations must be positive but is 0"),
        ({"pred": torch.zeros(2, 3, 4, 0), "target": torch.zeros(2, 4, 0)}, "D must be positive but is 0"),
        ({"target": torch.zeros(2, 4, 8, dtype=torch.int64)}, "target must be floating point but is torch.int64"),
    ],
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        token_match(**{"pred": torch.zeros(2, 3, 4, 8), "target": torch.zeros(2, 4, 8), **change})


@each_backend("token_match", "triton")
def test_triton_other_slices(backend, device):
    """Slices that divide neither the width nor a vector, other warps: the plan does not depend on them."""
    from stellar_fast.kernels.token_match.config import Config
    from stellar_fast.kernels.token_match.kernel import launch_token_match_fwd

    pred, target = (x.to(device) for x in inputs(B=1, V=2, K=5, D=21).values())
    want = transport_plan(pred.double(), target.double())
    for config in (Config(1, 1), Config(8, 2), Config(32, 4)):
        with poisoned_memory():
            index, plan = launch_token_match_fwd(pred, target, None, 0.1, 5, True, config)
        assert torch.equal(index, want.argmax(-1))
        torch.testing.assert_close(plan.double(), want, rtol=1e-4, atol=1e-5)
