"""Edits of the factorised latent: tokens dropped, swapped or blended, for `StellarModel.reconstruct` to decode.

The low-rank embedding is a sum over tokens, ``Z = sum_k L_k S_k``: what a token says (S_k) at the places it has (L_k).
An edit changes terms of that sum and leaves the others as they are. B images, K sparse tokens, P patches, D width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast
from stellar_fast.models.output import StellarOutput

Features = TypeVar("Features", bound=Mapping[str, Tensor])
Tokens = int | Sequence[int] | Tensor


def check_latent(sparse: Tensor, spatial: Tensor) -> None:
    """ValueError unless these are tokens (B, K, D) and their places (B, P, K)."""
    if sparse.dim() != 3 or spatial.dim() != 3 or sparse.shape[:2] != (spatial.shape[0], spatial.shape[2]):
        raise ValueError(
            f"sparse {tuple(sparse.shape)} and spatial {tuple(spatial.shape)} are not (B, K, D) and (B, P, K)"
        )


def _latent(features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "sparse" not in features or "spatial" not in features:
        raise ValueError(f"features need 'sparse' and 'spatial' but have {', '.join(map(repr, features)) or 'nothing'}")
    check_latent(features["sparse"], features["spatial"])
    return features["sparse"], features["spatial"]


def _chosen(tokens: Tokens | None, sparse: Tensor) -> Tensor:
    """(1 or B, K, 1) bool: which rows of `sparse` are meant."""
    B, K, _ = sparse.shape
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        if tokens.shape != (B, K):
            raise ValueError(f"tokens is a mask of shape {tuple(tokens.shape)} but the features have {(B, K)} tokens")
        return tokens.to(sparse.device)[..., None]
    if isinstance(tokens, Tensor):
        tokens = tokens.flatten().tolist()
    indices = list(range(K)) if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
    for token in indices:
        if not 0 <= token < K:
            raise ValueError(f"there is no token {token}: the features have {K} tokens, 0 to {K - 1}")
    mask = torch.tensor([token in indices for token in range(K)], device=sparse.device)
    return mask[None, :, None]


def _same_tokens(a: Tensor, b: Tensor) -> Tensor:
    """b's tokens, to be put into a's."""
    if a.shape != b.shape:
        raise ValueError(f"a has sparse tokens {tuple(a.shape)} but b has {tuple(b.shape)}")
    return b.to(a.device, a.dtype)


def _edited(features: Features, sparse: Tensor, spatial: Tensor) -> Features:
    """The features with another latent; what follows from it is computed anew, `cls` and `dense` stay."""
    changed: dict[str, Any] = {"sparse": sparse, "spatial": spatial}
    if "lowrank" in features:
        with without_autocast(sparse):
            lowrank = at_least_fp32(spatial) @ at_least_fp32(sparse)
        changed["lowrank"] = lowrank.to(features["lowrank"].dtype)
    if "peak_dist" in features:
        changed["peak_dist"] = spatial.detach().amax(dim=1)
    if isinstance(features, StellarOutput):
        return dataclasses.replace(features, **changed)
    if "concat" in features:
        changed["concat"] = torch.cat((sparse, spatial.mT.to(sparse.dtype)), dim=-1)
    return {**features, **changed}  # type: ignore[return-value]


def drop_tokens(features: Features, tokens: Tokens) -> Features:
    """Remove tokens from images: what they say and where they are.

    The localization of the others is not scaled up, so that their terms of the low-rank embedding are exactly what they
    were and nothing takes the place of what is gone: a patch that a dropped token had to itself becomes zero. Tokens
    keep their numbers. Dropping one after another is dropping both, and features without any token still decode.

    Args:
        features: what `encode` returned, or a mapping with `sparse` (B, K, D) and `spatial` (B, P, K).
        tokens: a token's number, several, or a bool mask (B, K) that says which of each image.

    Returns:
        Features of the same kind, for `StellarModel.reconstruct`: `sparse`, `spatial`, and where they were there
        `lowrank`, `peak_dist` and `concat`, are changed.

    Raises:
        ValueError: features without tokens and places, or tokens that they do not have.
    """
    sparse, spatial = _latent(features)
    chosen = _chosen(tokens, sparse)
    return _edited(features, sparse.masked_fill(chosen, 0), spatial.masked_fill(chosen.mT, 0))


def swap_tokens(a: Features, b: Mapping[str, Tensor], tokens: Tokens | None = None) -> Features:
    """Put what b's tokens say in the places of a's tokens; for both directions call it twice.

    Args:
        a: features of the images that are changed; their localization stays.
        b: features of as many images, of any size; only their `sparse` (B, K, D) is read.
        tokens: as in `drop_tokens`; None takes all.

    Returns:
        Features like a's.

    Raises:
        ValueError: a and b have tokens of different shapes, or do not have those asked for.
    """
    return blend_tokens(a, b, 1.0, tokens)


def blend_tokens(a: Features, b: Mapping[str, Tensor], weight: float, tokens: Tokens | None = None) -> Features:
    """Blend what tokens say, ``(1 - weight) a + weight b``, in the places of a's tokens.

    Args:
        a: features of the images that are changed; their localization stays.
        b: features of as many images, of any size; only their `sparse` (B, K, D) is read.
        weight: in [0, 1]; 0 gives a's tokens exactly, 1 gives b's.
        tokens: as in `drop_tokens`; None takes all.

    Returns:
        Features like a's.

    Raises:
        ValueError: a weight outside of [0, 1]; a and b have tokens of different shapes, or do not have those asked for.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1] but is {weight}")
    sparse, spatial = _latent(a)
    if "sparse" not in b:
        raise ValueError(f"b needs 'sparse' but has {', '.join(map(repr, b)) or 'nothing'}")
    other = _same_tokens(sparse, b["sparse"])
    return _edited(a, torch.where(_chosen(tokens, sparse), torch.lerp(sparse, other, weight), sparse), spatial)
