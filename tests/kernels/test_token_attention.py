"""token_attention's Triton kernels, called directly: every variant, by the interpreter and on a GPU."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stellar_fast import aot
from stellar_fast import backend as backends
from stellar_fast.kernels.common.launch import record
from stellar_fast.kernels.token_attention import kernel
from stellar_fast.kernels.token_attention.config import Config, Tile, candidates, heuristic, is_valid, runs
from stellar_fast.kernels.token_attention.kernel import (
    inspect_launches,
    launch_token_attention_bwd,
    launch_token_attention_fwd,
)
from stellar_fast.ops import token_attention, token_self_attention
from tests.harness import LAYOUTS, check_op, check_registered, each_backend, each_dtype, poisoned_memory
from tests.roundings import RandomRoundings, allowances, reasons

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def each(names: str, interpreted: list, on_gpu: list):
    """Parametrise by device too: a few cases for the interpreter, which takes a second for each, and all on a GPU."""
    cases = [pytest.param(*case, "cpu", marks=pytest.mark.interpreter) for case in interpreted]
    cases += [pytest.param(*case, "cuda", marks=pytest.mark.cuda) for case in on_gpu]
    return pytest.mark.parametrize(f"{names},device".split(","), cases)


NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")

# Each kernel and each way through it, by tiles and lengths.
SHORT, MIXED = [1, 17, 53, 64], [1, 17, 53, 64, 65, 130]
VARIANTS = {
    "one tile each way": (Config(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)), SHORT),
    "all keys, steps of queries": (Config(Tile(16, 64, 4, 1), Tile(16, 64, 8, 2)), SHORT),
    "tiles of keys": (Config(Tile(32, 64, 4, 2), Tile(16, 64, 8, 2)), MIXED),
    "smallest tiles": (Config(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)), [1, 17, 65]),
}


class Case:
    """A packed batch: q, k and v views of one tensor where the lengths agree."""

    def __init__(self, lengths_q, lengths_k, d, dtype, device, heads=2, scale=None):
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        self.lengths = lengths_q, lengths_k
        self.longest = max(lengths_q), max(lengths_k)
        self.starts = [
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in self.lengths
        ]
        self.q, self.k, self.v = draw(sum(lengths_k), 3, heads, d).unbind(1)
        if lengths_q != lengths_k:
            self.q = draw(sum(lengths_q), heads, d + 8)[..., :d]
        self.grad_out = draw(sum(lengths_q), heads + 1, d)[:, 1:]
        self.scale = d**-0.5 if scale is None else scale
        self.default = heuristic({"Lq": self.longest[0], "Lk": self.longest[1], "d": d}, dtype, device)

    def ours(self, config: Config) -> list[Tensor]:
        of_batch = (*self.starts, *self.longest, self.scale, config)
        with poisoned_memory():
            out, lse = launch_token_attention_fwd(self.q, self.k, self.v, *of_batch)
            grads = launch_token_attention_bwd(self.grad_out, self.q, self.k, self.v, out, lse, *of_batch)
        for name, x in zip(NAMES, (out, lse, *grads), strict=True):
            assert x.is_contiguous() and x.dtype == (torch.float32 if name == "lse" else self.q.dtype), name
        return [out, lse, *grads]

    def formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A loop over sequences with every step in `dtype`; sequences without keys are zero."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        outs, lses = [], []
        for q_part, k_part, v_part in zip(
            *(x.split(n) for x, n in zip((q, k, v), (self.lengths[0], *self.lengths[1:] * 2), strict=True)), strict=True
        ):
            scores = (q_part.transpose(0, 1) * self.scale) @ k_part.permute(1, 2, 0)
            lses.append(scores.logsumexp(-1))
            outs.append((scores.softmax(-1) @ v_part.transpose(0, 1)).transpose(0, 1))
        out = torch.cat(outs)
        grads = torch.autograd.grad(out, (q, k, v), self.grad_out.to(dtype))
        found = zip(NAMES, (out.detach(), torch.cat(lses, dim=1).detach(), *grads), strict=True)
        return {name: x.nan_to_num(0.0) for name, x in found}

    def assert_right(self, found: Iterable[Tensor], names: Iterable[str] = NAMES) -> None:
        """No worse than the same formula in the inputs' dtype may be."""

        def drawn(roundings: RandomRoundings) -> dict[str, Tensor]:
            with roundings:
                return self.formula(self.q.dtype)

        exact = self.formula(torch.float64)
        allowed = allowances(drawn, exact)
        wrong = [
            reason
            for name, x in zip(names, found, strict=True)
            for reason in reasons(name, x, exact[name], allowed[name])
        ]
        assert not wrong, "\n".join(wrong)


@each(
    "variant,d,dtype",
    [(name, *case) for name in VARIANTS for case in ((16, FP32), (80, BF16), (24, FP16))],
    [(name, *case) for name in VARIANTS for case in itertools.product((7, 16, 64), (FP32, BF16, FP16))]
    + [(name, *case) for name in VARIANTS for case in itertools.product((80, 128), (BF16, FP16))],
)
def test_every_variant(variant, d, dtype, device):
    config, lengths = VARIANTS[variant]
    if device == "cpu" and d != 16:
        lengths = [lengths[1], lengths[-2]]
    case = Case(lengths, lengths, d, dtype, device, heads=1 if device == "cpu" and d == 16 else 2)
    case.assert_right(case.ours(config))


@each(
    "d,dtype,length_q,length_k",
    [(64, BF16, 53, 53), (128, FP32, 17, 56), (7, FP16, 1, 53), (64, FP16, 70, 70)],
    [
        (*case, *lengths)
        for case in itertools.product((64, 80, 128), (FP32, BF16))
        for lengths in ((53, 53), (1, 53), (17, 56), (70, 56), (66, 66), (213, 213), (1, 213), (273, 273), (17, 273))
    ],
)
def test_the_default_config(d, dtype, length_q, length_k, device):
    case = Case([length_q, 1], [length_k, 1], d, dtype, device)
    case.assert_right(case.ours(case.default))


@each(
    "rows,dtype",
    [(1, FP32), (17, BF16), (70, FP16)],
    list(itertools.product((1, 17, 70), (FP32, BF16, FP16))),
)
def test_queries_that_are_not_the_keys_rows(rows, dtype, device):
    case = Case([rows, 1], [53, 66], 24, dtype, device)
    for config in (case.default, VARIANTS["tiles of keys"][0]):
        case.assert_right(case.ours(config))


@each("variant,dtype", *[list(itertools.product(VARIANTS, (FP32, BF16)))] * 2)
def test_large_scores_stay_finite(variant, dtype, device):
    case = Case([1, 53], [1, 53], 16, dtype, device, heads=1, scale=1000.0)
    for (name, exact), ours in zip(case.formula(torch.float64).items(), case.ours(VARIANTS[variant][0]), strict=True):
        assert ours.isfinite().all(), name
        # scores of thousands have lost 1e-3 before the exponential; gradients that cancel keep what their terms lost
        lost = 100 * torch.finfo(dtype).eps * case.scale if name.startswith("grad") else 0.0
        assert (ours.double() - exact).abs().max() <= 2e-2 * exact.abs().max() + lost, name


@each("variant,dtype", *[list(itertools.product(VARIANTS, (FP32, BF16)))] * 2)
def test_sequences_without_queries_or_keys(variant, dtype, device):
    """Of four sequences only the first has both: what it gives alone, and zeros."""
    case = Case([3, 0, 5, 2], [4, 60, 0, 0], 16, dtype, device)
    out, lse, grad_q, grad_k, grad_v = case.ours(VARIANTS[variant][0])
    alone = Case([3], [4], 16, dtype, device)
    alone.q, alone.grad_out = case.q[:3], case.grad_out[:3]
    alone.k, alone.v = case.k[:4], case.v[:4]
    alone.assert_right((out[:3], lse[:, :3], grad_q[:3], grad_k[:4], grad_v[:4]))
    assert not any(x.any() for x in (out[3:], grad_q[3:], grad_k[4:], grad_v[4:]))
    assert (lse[:, 3:] == -torch.inf).all()


NO_QUERIES = [([], []), ([0], [0]), ([0, 0], [3, 2])]


@each("lengths_q,lengths_k", NO_QUERIES, NO_QUERIES)
def test_no_queries_at_all(lengths_q, lengths_k, device):
    starts = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    ]
    for dtype, (config, _) in itertools.product((FP32, BF16), VARIANTS.values()):
        q, k = (torch.ones(sum(lengths), 2, 16, dtype=dtype, device=device) for lengths in (lengths_q, lengths_k))
        of_batch = (*starts, 0, max(lengths_k, default=0), 1.0, config)
        with poisoned_memory():
            out, lse = launch_token_attention_fwd(q, k, k, *of_batch)
            grads = launch_token_attention_bwd(out, q, k, k, out, lse, *of_batch)
        assert out.shape == q.shape and lse.shape == (2, 0)
        assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, (q, k, k), strict=True))


PART = [("one tile each way", BF16), ("smallest tiles", FP32), ("one tile each way", FP32), ("smallest tiles", BF16)]


@each("variant,dtype", PART[:2], PART)
def test_part_of_a_batch_into_given_tensors(variant, dtype, device):
    """Sequences 1 and 2 of 4: their rows of common outputs, and not one more."""
    case, config = Case([5, 40, 33, 8], [5, 40, 33, 8], 16, dtype, device), VARIANTS[variant][0]
    expected = case.ours(config)
    into = (torch.full_like(expected[0], 7.0), torch.full_like(expected[1], 7.0))
    grad = torch.full((86, 3, 2, 16), 7.0, dtype=dtype, device=device)
    of_part = (*(x[1:4] for x in case.starts), 40, 40, case.scale, config)
    out, lse = launch_token_attention_fwd(case.q, case.k, case.v, *of_part, into=into)
    grads = launch_token_attention_bwd(
        case.grad_out, case.q, case.k, case.v, out, lse, *of_part, out_grads=grad.unbind(1)
    )
    assert out is into[0] and lse is into[1] and grads[1].data_ptr() == grad[:, 1].data_ptr()
    for ours, want in zip((out, lse.T, *grads), (expected[0], expected[1].T, *expected[2:]), strict=True):
        assert torch.equal(ours[5:78], want[5:78])
        assert (ours[:5] == 7).all() and (ours[78:] == 7).all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "d"),
    [
        ([213] * 8, [213] * 8, 64),
        ([56] * 64, [56] * 64, 64),
        ([17] * 64, [56] * 64, 64),
        ([1] * 64, [53] * 64, 64),
        ([273] * 4, [273] * 4, 80),
        ([1024, 300], [1024, 300], 64),
        ([1, 17, 213], [273, 213, 213], 128),
    ],
)
def test_real_sizes_twice_the_same(lengths_q, lengths_k, d, dtype):
    case = Case(lengths_q, lengths_k, d, dtype, "cuda", heads=12)
    case.assert_right(case.ours(case.default))
    assert all(torch.equal(a, b) for a, b in zip(case.ours(case.default), case.ours(case.default), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_far_beyond_32_bits_of_elements(variant):
    """Row 1,000,000 of a (T, 3, 16, 64) tensor starts past element 2^31."""
    rows = 1_000_000
    qkv = torch.empty(rows + 20, 3, 16, 64, dtype=torch.bfloat16, device="cuda")
    case = Case([20], [20], 64, torch.bfloat16, "cuda", heads=16)
    qkv[rows:] = torch.stack((case.q, case.k, case.v), dim=1)
    starts = torch.tensor([rows, rows + 20], dtype=torch.int32, device="cuda")
    config = VARIANTS[variant][0]
    out, _ = launch_token_attention_fwd(*qkv.unbind(1), starts, starts, 20, 20, case.scale, config)
    assert torch.equal(out[rows:], case.ours(config)[0])


# through the door


@each_backend("token_attention", "triton")
@each_dtype("token_attention")
@pytest.mark.parametrize(
    "shape", ["small", {"N": 2, "Lq": 17, "Lk": 56, "H": 3, "d": 80}, {"N": 0, "Lq": 5, "Lk": 5, "H": 2, "d": 16}]
)
def test_no_worse_than_eager(backend, device, dtype, shape):
    layouts = LAYOUTS if shape == "small" else LAYOUTS[:1]
    check_op("token_attention", backend, shape, dtype, device, layouts=layouts)


@each_backend("token_attention", "triton")
def test_registration(backend, device):
    check_registered("token_attention", backend, {"N": 2, "Lq": 5, "Lk": 5, "H": 1, "d": 16}, device=device)


@each_backend("token_attention", "triton")
@each_dtype("token_attention")
def test_self_attention_is_attention_of_its_thirds(backend, device, dtype):
    groups = [(1, 5, 5), (2, 21, 21)]
    qkv = torch.randn(47, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    whole, parts = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    with backends.use_backend(token_attention=backend), backends.observe() as seen:
        ours = token_self_attention(whole, None, groups=groups)
        expected = token_attention(*parts.unbind(1), None, groups=groups)
        ours.float().square().sum().backward()
        expected.float().square().sum().backward()
    assert seen == {("token_attention", "triton")}
    assert torch.equal(ours, expected) and torch.equal(whole.grad, parts.grad)


MIXED_BATCHES = {  # groups and the sequences that each launch takes
    "three kinds": ([(2, 70, 70), (2, 9, 20), (1, 9, 17), (1, 9, 9)], [2, 3, 1]),
    "a part of the queries": ([(1, 33, 70), (2, 3, 20), (2, 1, 18)], [1, 4]),
    "nothing between": ([(1, 20, 20), (0, 70, 70), (2, 18, 18)], [3]),
    "sequences of nothing": ([(2, 40, 40), (2, 0, 9), (1, 5, 0)], [2, 3]),
    "in no order": ([(1, 40, 40), (1, 5, 5)] * 3, [6]),
}


@each("batch,dtype", *[list(itertools.product(MIXED_BATCHES, (FP32, BF16)))] * 2)
def test_a_mixed_batch_takes_a_launch_for_each_kind(batch, dtype, device, monkeypatch):
    groups, sequences = MIXED_BATCHES[batch]
    lengths_q, lengths_k = ([group[i] for group in groups for _ in range(group[0])] for i in (1, 2))
    case = Case(lengths_q, lengths_k, 16, dtype, device, heads=1)
    launches = {"fwd": [], "bwd": []}
    for direction, done in launches.items():
        run = getattr(kernel, f"launch_token_attention_{direction}")

        def note(*args, run=run, done=done, **kwargs):
            knobs = next(x for x in args if isinstance(x, Config))
            starts = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.int32]
            done.append((len(starts[0]) - 1, knobs))
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, f"launch_token_attention_{direction}", note)

    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    with backends.use_backend(token_attention="triton"), poisoned_memory():
        out = token_attention(*leaves, None, groups=groups)
        grads = torch.autograd.grad(out, leaves, case.grad_out)
    for done in launches.values():
        assert [count for count, _ in done] == sequences
        assert len({knobs for _, knobs in done}) == len(sequences)
    case.assert_right((out.detach(), *grads), ("out", *NAMES[2:]))


# ahead of time


def figures(shape: dict[str, int], dtype: torch.dtype, arch: str) -> list[aot.Figures]:
    with record() as launches:
        inspect_launches({"N": 16, "H": 12, **shape}, dtype, heuristic(shape, dtype, arch))
    return [aot.Job.of("token_attention", str(shape), str(dtype), arch, launch).run() for launch in launches]


@pytest.mark.parametrize(("length", "d"), [(56, 64), (213, 64), (273, 80)])
def test_full_length_kernels_multiply_by_warpgroups(length, d):
    for found in figures({"Lq": length, "Lk": length, "d": d}, BF16, "sm_90"):
        assert not found.problems, found
        assert found.tensor_core.get("HGMMA", 0) > 0 or found.kernel.endswith("delta"), found


# config


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("d", [16, 64, 80, 128])
def test_defaults_are_valid_and_fit_the_lengths(d, dtype):
    for Lq, Lk, arch in itertools.product((0, 1, 17, 64, 65, 300), (0, 1, 53, 66, 213, 273), ("sm_80", "sm_90", "cpu")):
        shape = {"Lq": Lq, "Lk": Lk, "d": d}
        assert is_valid(heuristic(shape, dtype, arch), shape, dtype), (shape, arch)


def test_what_is_not_valid():
    shape = {"Lq": 213, "Lk": 213, "d": 64}
    good = heuristic(shape, BF16, "sm_90")
    for changed in (
        replace(good.backward, block_q=48),
        replace(good.backward, block_k=8),
        replace(good.backward, block_k=512),
        replace(good.backward, num_warps=3),
        replace(good.backward, num_stages=0),
        replace(good.backward, block_q=128),
    ):
        assert not is_valid(replace(good, backward=changed), shape, BF16), changed
    assert not is_valid(good, shape, FP32)
    found = list(candidates(shape, BF16))
    assert good in found and len(found) == len(set(found)) > 20
    assert all(is_valid(config, shape, BF16) for config in found)


def test_a_mixed_batch_is_split_where_the_tiles_change():
    def split(*groups):
        found = runs(groups, {"d": 64}, BF16, "sm_90")
        for run in found:
            assert run.config == heuristic({"Lq": run.longest_q, "Lk": run.longest_k, "d": 64}, BF16, "sm_90")
        return [run[:4] for run in found]

    assert split((4, 213, 213), (32, 56, 56), (32, 53, 53)) == [(0, 4, 213, 213), (4, 68, 56, 56)]
    assert split((4, 213, 213), (32, 17, 56), (32, 1, 53)) == [(0, 4, 213, 213), (4, 36, 17, 56), (36, 68, 1, 53)]
    assert split((2, 60, 60)) == [(0, 2, 60, 60)]
    assert split((2, 60, 60), (0, 213, 213), (1, 50, 50)) == [(0, 3, 60, 60)]
    # more than four: one for all
    assert split(*[(1, 213, 213), (1, 56, 56)] * 2) == [
        (0, 1, 213, 213),
        (1, 2, 56, 56),
        (2, 3, 213, 213),
        (3, 4, 56, 56),
    ]
    assert split(*[(1, 213, 56), (1, 56, 213)] * 3) == [(0, 6, 213, 213)]
    assert split() == []
