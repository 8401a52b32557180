"""The models: encoder, decoder, VQGAN, checkpoints."""

from stellar_fast.models.config import PRESETS, DecoderConfig, EncoderConfig, VQGANConfig
from stellar_fast.models.encoder import StellarEncoder
from stellar_fast.models.hub import from_pretrained, load_stellar
from stellar_fast.models.latents import blend_tokens, drop_tokens, swap_tokens
from stellar_fast.models.output import StellarOutput
from stellar_fast.models.stellar import StellarModel
from stellar_fast.models.vqgan import VQGAN

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
    "swap_tokens",
]
