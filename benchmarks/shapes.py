"""Named shapes of the benchmarks, and the work that each of them needs.

FLOPs are model FLOPs: the work the mathematics needs, a multiply-add counted as two, the same for every provider.
Counted are the transformer layers (linears and attention) and the clustering heads. The patch embedding, the
projections of the factorisation and the output layer are under 1 % together and left out, and so is everything
elementwise. A backward pass counts as two forward passes.
"""

from dataclasses import dataclass

from stellar_fast.models.config import DecoderConfig, EncoderConfig, resolve_preset

# batch sizes that published ratios use
ENCODE_BATCH = 8
STEP_BATCH = 2

MASKING_RATIO = 0.8


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes the work of one training step of one image."""

    preset: str
    encoder: EncoderConfig
    decoder: DecoderConfig
    num_sparse_tokens: int = 16
    num_masks: int = 8
    num_local_crops: int = 8
    num_clusters: int = 16384
    predictor_hidden_dim: int = 2048
    prototype_dim: int = 256

    @property
    def image_size(self) -> int:
        return self.encoder.image_size

    @property
    def local_size(self) -> int:
        """Side of a local view in pixels: 96 at 224, in proportion at other sizes."""
        return max(self.encoder.patch_size, self.image_size * 96 // 224)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.encoder.patch_size) ** 2

    @property
    def num_kept(self) -> int:
        """Visible patches of a masked view."""
        return int(self.num_patches * (1 - MASKING_RATIO))

    @property
    def num_local_patches(self) -> int:
        return (self.local_size // self.encoder.patch_size) ** 2

    def describe(self, batch: int, step: bool) -> str:
        """The shape in words, for tables and CSV rows."""
        text = f"B={batch} {self.image_size}px/{self.encoder.patch_size} K={self.num_sparse_tokens}"
        if step:
            text += f" {self.num_masks} masked ({self.num_kept} kept) {self.num_local_crops} local {self.local_size}px"
            text += f" C={self.num_clusters} pixel head"
        return text


def model_shape(preset: str) -> ModelShape:
    """The shape of a preset of the package. Raises ValueError for an unknown name."""
    sizes = resolve_preset(preset)
    return ModelShape(preset.removeprefix("stellar-"), sizes.encoder, sizes.decoder, **sizes.model)


def trunk_flops(config: EncoderConfig | DecoderConfig, tokens: int) -> float:
    """Forward FLOPs of one sequence through the layers of a ViT."""
    width = config.hidden_size
    linears = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 4 * tokens**2 * width
    return config.num_hidden_layers * (linears + attention)


def head_flops(shape: ModelShape, tokens: int) -> float:
    """Forward FLOPs of a clustering head (two-layer predictor, then prototypes)."""
    hidden, out = shape.predictor_hidden_dim, shape.prototype_dim
    return 2 * tokens * (shape.encoder.hidden_size * hidden + hidden * out + out * shape.num_clusters)


def forward_flops(shape: ModelShape) -> dict[str, float]:
    """Forward FLOPs of one image in training, by part."""
    special = 1 + shape.num_sparse_tokens
    head_tokens = special + shape.num_masks * special + shape.num_local_crops
    return {
        "clean": trunk_flops(shape.encoder, special + shape.num_patches),
        "masked": shape.num_masks * trunk_flops(shape.encoder, special + shape.num_kept),
        "local": shape.num_local_crops * trunk_flops(shape.encoder, special + shape.num_local_patches),
        "decoder": trunk_flops(shape.decoder, shape.num_patches),
        "heads": head_flops(shape, head_tokens),
    }


def encode_flops(shape: ModelShape, batch: int) -> float:
    """FLOPs to encode a batch."""
    return batch * forward_flops(shape)["clean"]


def step_flops(shape: ModelShape, batch: int) -> float:
    """FLOPs of a training step, forward and backward."""
    return 3 * batch * sum(forward_flops(shape).values())


def encode_bytes(parameters: int, batch: int, shape: ModelShape) -> int:
    """Bytes that encoding must move at least: fp32 weights read once, images read, activations not counted."""
    return 4 * (parameters + batch * 3 * shape.image_size**2)


def step_bytes(parameters: int) -> int:
    """Bytes that a step must move at least, activations not counted.

    Per trained fp32 parameter: the weight read forward and backward, its gradient written and read for the clipping
    norm, then AdamW reads weight, gradient and two moments and writes weight and moments.
    """
    return 4 * parameters * (2 + 2 + 4 + 3)
