"""token_attention for tests and benchmarks. N sequences of Lq queries and Lk keys each, H heads, d channels a head."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from stellar_fast.kernels.token_attention import reference
from stellar_fast.registry import OpSpec, Shape, draw


def _make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Lengths differ from sequence to sequence (down to half) where the shape says so with ragged=1."""
    N, H, d = shape["N"], shape["H"], shape["d"]
    lengths_q, lengths_k = (
        [shape[L] - shape.get("ragged", 0) * (i * shape[L] // (2 * N)) for i in range(N)] for L in ("Lq", "Lk")
    )
    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    starts = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    return {
        "q": draw(generator, rows_q, H, d, dtype=dtype, device=device),
        "k": draw(generator, rows_k, H, d, dtype=dtype, device=device),
        "v": draw(generator, rows_k, H, d, dtype=dtype, device=device),
        "cu_seqlens_q": starts[0].to(device),
        "cu_seqlens_k": starts[1].to(device),
        "groups": [(1, length_q, length_k) for length_q, length_k in zip(lengths_q, lengths_k, strict=True)],
    }


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    groups: Any = None,
    scale: float | None = None,
) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lengths_q, lengths_k = (starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
    return reference.token_attention(q, k, v, lengths_q, lengths_k, scale).to(q.dtype)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    groups: Any = None,
    scale: float | None = None,
) -> Tensor:
    """The same with every step in the inputs' own dtype."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs = []
    lengths = (starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))
    splits = (x.transpose(0, 1).split(n, dim=1) for x, n in zip((q, k, v), lengths, strict=True))
    for q_part, k_part, v_part in zip(*splits, strict=True):
        outs.append((scale * q_part @ k_part.mT).softmax(dim=-1) @ v_part)
    return torch.cat(outs, dim=1).transpose(0, 1) if outs else q + k.sum() + v.sum()


def _flops(shape: Shape) -> float:
    return 4.0 * shape["N"] * shape["Lq"] * shape["Lk"] * shape["H"] * shape["d"]


def _bytes(shape: Shape, itemsize: int) -> float:
    return 2.0 * itemsize * shape["N"] * (shape["Lq"] + shape["Lk"]) * shape["H"] * shape["d"]


SPEC = OpSpec(
    name="token_attention",
    shapes={
        "small": {"N": 3, "Lq": 21, "Lk": 21, "H": 2, "d": 16, "ragged": 1},
        "b16_clean": {"N": 8, "Lq": 213, "Lk": 213, "H": 12, "d": 64},
        "b16_masked": {"N": 64, "Lq": 56, "Lk": 56, "H": 12, "d": 64},
        "b16_local": {"N": 64, "Lq": 53, "Lk": 53, "H": 12, "d": 64},
        "b16_masked_last": {"N": 64, "Lq": 17, "Lk": 56, "H": 12, "d": 64},
        "b16_local_last": {"N": 64, "Lq": 1, "Lk": 53, "H": 12, "d": 64},
    },
    odd_shapes=(
        {"N": 0, "Lq": 5, "Lk": 5, "H": 2, "d": 16},
        {"N": 2, "Lq": 1, "Lk": 1, "H": 1, "d": 8},
        {"N": 2, "Lq": 17, "Lk": 56, "H": 3, "d": 80},
        {"N": 3, "Lq": 1, "Lk": 53, "H": 2, "d": 7},
        {"N": 1, "Lq": 213, "Lk": 213, "H": 1, "d": 128},
    ),
    make_inputs=_make_inputs,
    reference=_reference,
    eager=_eager,
    gradients=("q", "k", "v"),
    flops=_flops,
    bytes=_bytes,
    backward=2.5,  # five products, two of them the forward's again
)
