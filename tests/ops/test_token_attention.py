"""token_attention: packed sequences, by every backend."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from stellar_fast import backend as backends
from stellar_fast.ops import token_attention, token_self_attention
from tests.harness import check_op, check_registered, each_backend, each_dtype, each_shape

MIXED = [(1, 5, 5), (2, 40, 40), (3, 1, 17)]  # q rows, k rows: 88 and 136


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@each_backend("token_attention", "cpu", "torch", "reference")
@each_dtype("token_attention")
@each_shape("token_attention")
def test_no_worse_than_eager(backend, device, dtype, shape):
    if backend == "cpu" and dtype == torch.float16:
        with backends.use_backend(token_attention="cpu"), pytest.raises(ValueError, match=r"compute in torch.float16"):
            token_attention(*(torch.zeros(1, 1, 8, dtype=dtype),) * 3, None, groups=[(1, 1, 1)])
        return
    check_op("token_attention", backend, shape, dtype, device)


@each_backend("token_attention", "cpu", "torch", "reference")
def test_registration(backend, device):
    check_registered("token_attention", backend, device=device)


@pytest.mark.parametrize("scale", [None, 0.3, 1000.0])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_mixed_lengths_against_sdpa_in_fp64(backend, scale):
    q, k, v = (draw(rows, 2, 24, seed=i) for i, rows in enumerate((88, 136, 136)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with backends.use_backend(token_attention=backend):
        out = token_attention(*leaves, None, groups=MIXED, scale=scale)
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    pieces, at_q, at_k = [], 0, 0
    for count, length_q, length_k in MIXED:
        for _ in range(count):
            parts = (
                x[at : at + length].transpose(0, 1)
                for x, at, length in zip(exact_leaves, (at_q, at_k, at_k), (length_q, length_k, length_k), strict=True)
            )
            pieces.append(F.scaled_dot_product_attention(*parts, scale=scale).transpose(0, 1))
            at_q, at_k = at_q + length_q, at_k + length_k
    exact = torch.cat(pieces)
    cotangent = draw(*out.shape, seed=9)
    out.backward(cotangent)
    exact.backward(cotangent.double())
    tolerance = 1e-5 if scale != 1000.0 else 2e-2  # a score of 1000 times 1 has lost 1e-4 before the exponential
    assert torch.allclose(out.double(), exact, atol=tolerance, rtol=tolerance)
    for have, want in zip(leaves, exact_leaves, strict=True):
        bound = tolerance * want.grad.abs().max() + 1e-7
        assert (have.grad.double() - want.grad).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_self_attention_is_attention_of_its_thirds(backend, dtype):
    qkv = draw(85, 3, 2, 16, dtype=dtype)
    groups = [(1, 5, 5), (2, 40, 40)]
    whole, parts = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    cotangent = draw(85, 2, 16, seed=1, dtype=dtype)
    with backends.use_backend(token_attention=backend), backends.observe() as seen:
        ours = token_self_attention(whole, None, groups=groups)
        ours.backward(cotangent)
    assert seen == (set() if backend == "torch" else {("token_attention", "cpu")})
    with backends.use_backend(token_attention=backend):
        expected = token_attention(*parts.unbind(1), None, groups=groups)
        expected.backward(cotangent)
    assert torch.equal(ours, expected) and torch.equal(whole.grad, parts.grad)


def test_self_attention_is_registered_well():
    starts = torch.tensor([0, 5, 45, 85], dtype=torch.int32)
    qkv = draw(85, 3, 2, 16).requires_grad_()
    torch.library.opcheck(torch.ops.stellar_fast.token_self_attention, (qkv, starts, [1, 5, 5, 2, 40, 40], 0.25, "cpu"))
    compiled = torch.compile(token_self_attention, fullgraph=True, backend="aot_eager")
    groups = [(1, 5, 5), (2, 40, 40)]
    assert torch.equal(compiled(qkv, starts, groups=groups), token_self_attention(qkv, starts, groups=groups))


def test_lengths_from_cu_seqlens_alone_and_from_groups_alone():
    q, k, v = (draw(rows, 2, 24, seed=i) for i, rows in enumerate((88, 136, 136)))
    starts_q = torch.tensor([0, 5, 45, 85, 86, 87, 88], dtype=torch.int32)
    starts_k = torch.tensor([0, 5, 45, 85, 102, 119, 136], dtype=torch.int32)
    expected = token_attention(q, k, v, None, groups=MIXED)
    assert torch.equal(token_attention(q, k, v, starts_q, starts_k), expected)
    assert torch.equal(token_attention(q, k, v, starts_q, starts_k, groups=MIXED), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sequences_without_queries_or_keys(backend):
    q, k = draw(3, 1, 4), draw(2, 1, 4, seed=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    with backends.use_backend(token_attention=backend):
        out = token_attention(*leaves, None, groups=[(1, 3, 0), (1, 0, 2)])
    assert torch.equal(out, torch.zeros(3, 1, 4))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_the_result_does_not_depend_on_threads():
    qkv = draw(213, 3, 4, 64).requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = token_self_attention(qkv, None, groups=[(1, 100, 100), (1, 113, 113)])
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), qkv)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_beyond_the_kernels_range_torch_computes():
    wide = [draw(6, 1, 160, seed=i) for i in range(3)]
    with backends.observe() as seen:
        out = token_attention(*wide, None, groups=[(2, 3, 3)])
    assert not seen
    with backends.use_backend("reference"):
        assert torch.allclose(out, token_attention(*wide, None, groups=[(2, 3, 3)]), atol=1e-5)
    with backends.use_backend(token_attention="cpu"), pytest.raises(ValueError, match="head_dim 160 is above 128"):
        token_attention(*wide, None, groups=[(2, 3, 3)])


def test_forward_mode_is_exact():
    x, tangent = draw(6, 3, 1, 8), draw(6, 3, 1, 8, seed=1)
    _, ours = torch.func.jvp(lambda x: token_self_attention(x, None, groups=[(2, 3, 3)]), (x,), (tangent,))
    with backends.use_backend("reference"):
        _, expected = torch.func.jvp(lambda x: token_self_attention(x, None, groups=[(2, 3, 3)]), (x,), (tangent,))
    assert torch.allclose(ours, expected, atol=1e-6) and expected.abs().max() > 0


def test_what_does_not_fit_is_refused():
    q, k = torch.zeros(4, 2, 8), torch.zeros(6, 2, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="k has d=7 but q has d=8"):
        token_attention(q, k[..., :7], k, starts)
    with pytest.raises(ValueError, match=r"one dtype but have torch.float32, torch.float64"):
        token_attention(q, k.double(), k.double(), starts)
    with pytest.raises(ValueError, match="needs cu_seqlens_q or groups"):
        token_attention(q, k, k, None)
    with pytest.raises(ValueError, match="k has 6 rows but its sequences have 4"):
        token_attention(q, k, k, None, groups=[(1, 4, 4)])
    with pytest.raises(ValueError, match="q has 4 rows but its sequences have 5"):
        token_attention(q, k, k, None, groups=[(1, 5, 6)])
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be \(sequences \+ 1,\) int32 but is \(2,\) torch.int64"):
        token_attention(q, q, q, starts.long())
    with pytest.raises(ValueError, match="cu_seqlens_q has 1 sequences but groups have 2"):
        token_attention(q, q, q, starts, groups=[(2, 2, 2)])
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, heads, head_dim\) but has shape \(4, 2, 8\)"):
        token_self_attention(q, starts)


BAD_LENGTHS = {  # starts_q, starts_k, groups of 6 rows each
    "groups differ": ([0, 1, 6], None, [(2, 3, 3)], r"cu_seqlens_q\[1\] is 1 but groups put it at 3"),
    "groups differ in k": ([0, 3, 6], [0, 4, 6], [(2, 3, 3)], r"cu_seqlens_k\[1\] is 4 but groups put it at 3"),
    "one of both": ([0, 2, 6], None, [(1, 2, 4), (1, 4, 2)], r"cu_seqlens_k\[1\] is 2 but groups put it at 4"),
    "empty sequences": ([0, 1, 6], None, [(1, 0, 0), (1, 6, 6)], r"cu_seqlens_q\[1\] is 1 but groups put it at 0"),
    "from 1": ([1, 6], None, None, "cu_seqlens_q must run from 0 to 6 but runs from 1 to 6"),
    "from 1 with groups": ([1, 6], None, [(1, 6, 6)], "cu_seqlens_q must run from 0 to 6 but runs from 1 to 6"),
    "beyond the rows": ([1, 7], None, None, "cu_seqlens_q must run from 0 to 6 but runs from 1 to 7"),
    "before the rows": ([-2, 4], None, None, "cu_seqlens_q must run from 0 to 6 but runs from -2 to 4"),
    "not all of k": ([0, 6], [0, 5], None, "cu_seqlens_k must run from 0 to 6 but runs from 0 to 5"),
    "falls": ([0, 5, 3, 6], None, None, "cu_seqlens_q must not fall but goes from 5 to 3"),
    "falls with groups": ([0, 5, 3, 6], None, [(3, 2, 2)], "cu_seqlens_q must not fall but goes from 5 to 3"),
    "negative length": (None, None, [(1, -2, -2), (1, 8, 8)], r"not be negative but have \(1, -2, -2\)"),
    "negative count": ([0, 6], None, [(-1, 6, 6), (2, 6, 6)], r"not be negative but have \(-1, 6, 6\)"),
    "k alone": (None, [0, 3, 6], [(2, 3, 3)], r"cu_seqlens_q is None but cu_seqlens_k has shape \(3,\)"),
}


@each_backend("token_attention")
@pytest.mark.parametrize("case", BAD_LENGTHS)
def test_lengths_that_do_not_fit_are_refused(case, backend, device, monkeypatch):
    monkeypatch.setenv("STELLAR_FAST_CHECK", "1")
    starts_q, starts_k, groups, message = BAD_LENGTHS[case]
    x = torch.zeros(6, 1, 8, device=device)
    starts = [s if s is None else torch.tensor(s, dtype=torch.int32, device=device) for s in (starts_q, starts_k)]
    with backends.use_backend(token_attention=backend):
        with pytest.raises(ValueError, match=message):
            token_attention(x, x, x, *starts, groups=groups)
        if starts_k is None and case != "one of both":
            with pytest.raises(ValueError, match=message):
                token_self_attention(x[:, None].expand(6, 3, 1, 8), starts[0], groups=groups)


@each_backend("token_attention")
def test_self_attention_has_one_length_for_q_and_k(backend, device):
    x = torch.zeros(6, 3, 1, 8, device=device)
    with backends.use_backend(token_attention=backend), pytest.raises(ValueError, match="q and k but have 2 and 4"):
        token_self_attention(x, None, groups=[(1, 2, 4), (1, 4, 2)])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_second_derivatives(backend):
    x = draw(5, 3, 1, 4, dtype=torch.float64).requires_grad_()
    with backends.use_backend(token_attention=backend):
        assert torch.autograd.gradgradcheck(lambda x: token_self_attention(x, None, groups=[(1, 2, 2), (1, 3, 3)]), x)


def test_the_kernels_refuse_second_derivatives():
    x = draw(5, 3, 1, 4).requires_grad_()
    with backends.use_backend(token_attention="cpu"):
        out = token_self_attention(x, None, groups=[(1, 5, 5)])
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"token_self_attention_backward.* no autograd formula"):
        grad.square().sum().backward()


LONG_SEQUENCE = """
import os, torch
from stellar_fast.ops import token_attention

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def attend(keys):
    q, k = torch.zeros(1, 1, 16, requires_grad=True), torch.zeros(keys, 1, 16)
    token_attention(q, k, k, None, groups=[(1, 1, keys)]).sum().backward()

attend(8)
before = resident_mib()
attend(200_000)
print(resident_mib() - before)
"""


def test_a_long_sequence_leaves_no_scratch_behind():
    """200,000 keys take 73 MiB of scratch forward and 147 MiB backward."""
    env = {**os.environ, "STELLAR_FAST_BACKEND": "token_attention=cpu"}
    done = subprocess.run([sys.executable, "-c", LONG_SEQUENCE], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40
