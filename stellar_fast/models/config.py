"""Sizes: encoder, decoder, VQGAN, and the named presets."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def _check_positive(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{type(config).__name__}.{f.name} must be at least 1 but is {value}")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer (Hugging Face names); image and patch in pixels."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_channels != 3:
            raise ValueError(f"images have 3 channels (RGB) but num_channels is {self.num_channels}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")

    @property
    def grid_side(self) -> int:
        """Patches along one side of a training image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class EncoderConfig(ViTConfig):
    """Sizes of the encoder; the defaults are those of b16."""


@dataclass(frozen=True)
class DecoderConfig(ViTConfig):
    """Sizes of the decoder. Image and patch size shape only its unused embedding, which weight files carry."""

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the MaskGIT-VQGAN; the defaults are those of the published ImageNet model."""

    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_resolutions: int = 5
    dropout: float = 0.0
    hidden_channels: int = 128
    num_channels: int = 3
    num_res_blocks: int = 2
    resolution: int = 256
    z_channels: int = 256
    num_embeddings: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        _check_positive(self)
        if len(self.channel_mult) != self.num_resolutions:
            raise ValueError(
                f"channel_mult {self.channel_mult} does not have num_resolutions {self.num_resolutions} levels"
            )
        if self.dropout:
            raise NotImplementedError(f"dropout {self.dropout}: the VQGAN is frozen and has none")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a code."""
        return 2 ** (self.num_resolutions - 1)


@dataclass(frozen=True)
class Preset:
    """A named model: sizes, and the model arguments that belong to them."""

    encoder: EncoderConfig
    decoder: DecoderConfig = DecoderConfig()
    model: dict[str, Any] = field(default_factory=dict)


_B16 = EncoderConfig()
PRESETS: dict[str, Preset] = {
    "b16": Preset(_B16),
    "l16": Preset(EncoderConfig(1024, 24, 16, 4096)),
    "h16": Preset(EncoderConfig(1280, 32, 16, 5120, patch_size=14)),
    "b8": Preset(_B16, model={"num_sparse_tokens": 8}),
    "b24": Preset(_B16, model={"num_sparse_tokens": 24}),
    "s16": Preset(
        EncoderConfig(384, 12, 6, 1536),
        DecoderConfig(256, 4, 4, 1024),
        {"num_clusters": 8192, "predictor_hidden_dim": 1024},
    ),
    # small enough to learn on two CPU cores in minutes
    "tiny": Preset(
        EncoderConfig(128, 4, 4, 512, image_size=96, patch_size=8),
        DecoderConfig(128, 2, 4, 512, image_size=96, patch_size=8),
        {"num_clusters": 512, "predictor_hidden_dim": 256, "prototype_dim": 64, "num_masks": 2, "num_local_crops": 2},
    ),
}


def resolve_preset(name: str) -> Preset:
    """Look a preset up by name; "stellar-b16" means "b16".

    Raises:
        ValueError: an unknown name; the message lists what exists.
    """
    preset = PRESETS.get(name.removeprefix("stellar-"))
    if preset is None:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return preset


def build_from(kind: Callable[..., T], arguments: Mapping[str, Any], what: str) -> T:
    """Call `kind` with saved arguments.

    Raises:
        ValueError: an argument that it does not have, or one that it needs and is not there; named.
    """
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in arguments if name not in parameters]
    needed = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
    if unknown or needed:
        wrong = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(needed)}"
        raise ValueError(f"the {what} config does not fit: {wrong}; it has {', '.join(parameters)}")
    return kind(**arguments)


def config_dict(config: ViTConfig | VQGANConfig) -> dict[str, Any]:
    """The config as JSON-able values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
