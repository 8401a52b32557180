"""Plain torch lowrank_product in fp32 (fp64 where given): the oracle that every other backend is held against.

Shapes: B images, P patches, K sparse tokens, D key width, E value width.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast

COSINE_EPS = 1e-7  # both sides are divided by max(norm, 1e-7)


def localization_logits(query_BPD: Tensor, key_BKD: Tensor, temperature: float | None) -> Tensor:
    """Cosine over temperature, or the scaled dot product when temperature is None. Returns (B, P, K) fp32."""
    query, key = at_least_fp32(query_BPD), at_least_fp32(key_BKD)
    if temperature is None:
        return query @ key.mT / math.sqrt(query.shape[-1])
    query, key = F.normalize(query, dim=-1, eps=COSINE_EPS), F.normalize(key, dim=-1, eps=COSINE_EPS)
    return query @ key.mT / temperature


def lowrank_product(
    query_BPD: Tensor,
    key_BKD: Tensor,
    value_BKE: Tensor,
    temperature: float | None = 0.06,
    bias_PE: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out (B,P,E), localization (B,P,K), peak (B,K) without gradient), all fp32."""
    with without_autocast(query_BPD):
        localization = localization_logits(query_BPD, key_BKD, temperature).softmax(dim=-1)
        out = localization @ at_least_fp32(value_BKE)
        if bias_PE is not None:
            out = out + at_least_fp32(bias_PE)
        return out, localization, localization.detach().amax(dim=1)
