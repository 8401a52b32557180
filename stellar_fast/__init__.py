"""stellar_fast: a fast engine for STELLAR, sparse visual representations by spatial-semantic factorization.

>>> import torch, stellar_fast
>>> encoder = stellar_fast.StellarEncoder("tiny")
>>> encoder(torch.rand(2, 3, 96, 96)).sparse.shape
torch.Size([2, 16, 128])
"""

from stellar_fast import ops
from stellar_fast.models import (
    PRESETS,
    VQGAN,
    DecoderConfig,
    EncoderConfig,
    StellarEncoder,
    StellarModel,
    StellarOutput,
    VQGANConfig,
    blend_tokens,
    drop_tokens,
    from_pretrained,
    load_stellar,
    swap_tokens,
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "VQGAN",
    "DecoderConfig",
    "EncoderConfig",
    "StellarEncoder",
    "StellarModel",
    "StellarOutput",
    "VQGANConfig",
    "blend_tokens",
    "drop_tokens",
    "from_pretrained",
    "load_stellar",
    "ops",
    "swap_tokens",
]
