"""The matrix product that all Triton kernels share."""

import pytest
import torch
import triton
import triton.language as tl

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tl_dot import dot


@triton.jit
def product_kernel(a, b, start, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.load(start + rows[:, None] * N + columns[None, :])
    for _ in range(2):
        acc = dot(
            tl.load(a + rows[:, None] * K + inner[None, :]), tl.load(b + inner[:, None] * N + columns[None, :]), acc
        )
    tl.store(out + rows[:, None] * N + columns[None, :], acc)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.cuda)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_accumulates_in_fp32(device: str, dtype: torch.dtype) -> None:
    M, N, K = 16, 16, 32
    generator = torch.Generator().manual_seed(0)
    a, b, start = (torch.randn(*size, generator=generator) for size in ((M, K), (K, N), (M, N)))
    a, b, start = a.to(device, dtype), b.to(device, dtype), start.to(device)
    out = torch.empty(M, N, device=device)
    launch(product_kernel, (1,), a, b, start, out, M=M, N=N, K=K, num_warps=4)
    expected = start.double() + 2 * (a.double() @ b.double())
    # products of 16-bit numbers are exact in fp32; three tf32 products carry 21 of fp32's 24 bits
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
