"""Plain torch token_attention in fp32 (fp64 where given): a loop over sequences. T rows, H heads, d channels a head."""

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast


def token_attention(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, lengths_q: list[int], lengths_k: list[int], scale: float
) -> Tensor:
    """Return (Tq, H, d), fp32; sequence i has lengths_q[i] rows of q and lengths_k[i] of k and v."""
    with without_autocast(q_THd):
        outs = []
        splits = (at_least_fp32(x).split(n) for x, n in ((q_THd, lengths_q), (k_THd, lengths_k), (v_THd, lengths_k)))
        for q, k, v in zip(*splits, strict=True):
            weights = (scale * torch.einsum("qhd,khd->hqk", q, k)).softmax(dim=-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        if not outs:
            return at_least_fp32(q_THd) + k_THd.sum() + v_THd.sum()  # no rows, but a gradient of that shape
        return torch.cat(outs)
