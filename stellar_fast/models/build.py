"""What the constructor of StellarModel accepts for its parts, turned into the parts."""

from pathlib import Path

from stellar_fast.models.config import DecoderConfig, EncoderConfig, VQGANConfig, config_dict
from stellar_fast.models.encoder import StellarEncoder
from stellar_fast.models.vqgan import VQGAN


class FromEncoder:
    """Default of `spatial_temp`, whose None has a meaning of its own: 0.06, or what a given encoder has."""

    def __repr__(self) -> str:
        return "0.06"


FROM_ENCODER = FromEncoder()


def build_encoder(
    encoder: EncoderConfig | StellarEncoder,
    asked_tokens: int | None,
    tokens: int,
    spatial_temp: float | FromEncoder | None,
) -> StellarEncoder:
    if not isinstance(encoder, StellarEncoder):
        return StellarEncoder(encoder, tokens, 0.06 if isinstance(spatial_temp, FromEncoder) else spatial_temp)
    if asked_tokens is not None and asked_tokens != encoder.num_sparse_tokens:
        raise ValueError(
            f"the encoder has {encoder.num_sparse_tokens} sparse tokens but num_sparse_tokens is {asked_tokens}"
        )
    if not isinstance(spatial_temp, FromEncoder) and spatial_temp != encoder.spatial_temp:
        raise ValueError(f"the encoder has spatial_temp {encoder.spatial_temp} but {spatial_temp} is asked for")
    return encoder


def with_depth(decoder: DecoderConfig, num_layers: int | None) -> DecoderConfig:
    return (
        decoder if num_layers is None else DecoderConfig(**(config_dict(decoder) | {"num_hidden_layers": num_layers}))
    )


def build_vqgan(vq_model: str | Path | VQGANConfig | VQGAN | None) -> VQGAN | None:
    if vq_model is None or isinstance(vq_model, VQGAN):
        return vq_model
    return VQGAN(vq_model) if isinstance(vq_model, VQGANConfig) else VQGAN.from_pretrained(vq_model)
