"""The encoder: a ViT whose sequence ends in K sparse tokens, and the factorisation of its output.

B images, P patches of a (height, width) grid, K sparse tokens, D width.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.models.config import EncoderConfig, build_from, config_dict, resolve_preset
from stellar_fast.models.hub import HubMixin
from stellar_fast.models.output import StellarOutput
from stellar_fast.models.weights import UpstreamWeightsMixin
from stellar_fast.nn.linear import Linear
from stellar_fast.nn.vit import Transformer, init_vit_weights
from stellar_fast.ops.lowrank_product import lowrank_product

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
RANGE_SLACK = 1e-3  # resizing overshoots by rounding; what is normalised or up to 255 is far beyond


def check_images(images: Tensor, patch_size: int, name: str = "images") -> None:
    """Raise ValueError unless `images` is (B, 3, H, W), uint8 or floating in [0, 1], of at least one patch.

    Values are read on a CPU; on CUDA, where reading waits for the device, only under STELLAR_FAST_CHECK=1.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be (B, 3, H, W) but has shape {tuple(images.shape)}")
    if min(images.shape[-2:]) < patch_size:
        raise ValueError(
            f"{name} of {images.shape[-2]}x{images.shape[-1]} pixels hold no patch of {patch_size}x{patch_size}"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{name} must be uint8 or floating point in [0, 1] but is {images.dtype}")
    if images.numel() and _values_are_checked(images):
        low, high = (bound.item() for bound in torch.aminmax(images.detach()))
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(f"{name} must lie in [0, 1] but span [{low:.6g}, {high:.6g}]; do not normalise them")


def to_unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as floating point in [0, 1], from that or from uint8."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def check_keep_indices(keep_indices: Tensor, num_images: int, num_patches: int) -> None:
    """Raise ValueError unless `keep_indices` is (num_images, kept) int64 with patches of the image; values as above."""
    shape = tuple(keep_indices.shape)
    if len(shape) != 2 or shape[0] != num_images or not 1 <= shape[1] <= num_patches:
        raise ValueError(f"keep_indices must be ({num_images}, 1 to {num_patches}) but has shape {shape}")
    if keep_indices.dtype != torch.int64:
        raise ValueError(f"keep_indices must be torch.int64 but is {keep_indices.dtype}")
    if keep_indices.numel() and _values_are_checked(keep_indices):
        low, high = (bound.item() for bound in torch.aminmax(keep_indices))
        if low < 0 or high >= num_patches:
            raise ValueError(f"keep_indices span [{low}, {high}] but the image has {num_patches} patches")


def _values_are_checked(tensor: Tensor) -> bool:
    readable = tensor.device.type == "cpu" or os.environ.get("STELLAR_FAST_CHECK") == "1"
    return readable and not torch.compiler.is_compiling()


class SparseViT(nn.Module):
    """ViT over [CLS, patches + position, K sparse tokens]; all tokens attend to all."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, num_sparse_tokens: int) -> None:
        super().__init__()
        if num_sparse_tokens < 1:
            raise ValueError(f"num_sparse_tokens must be at least 1 but is {num_sparse_tokens}")
        self.config = config
        dim, side = config.hidden_size, config.grid_side
        self.patch_embed = nn.Conv2d(3, dim, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + side * side, dim) * 0.02)
        self.sparse_tokens = nn.Parameter(torch.randn(num_sparse_tokens, dim) / math.sqrt(dim))
        self.transformer = Transformer(
            dim, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        )
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(3, 1, 1), persistent=False)
        self.reset_constants()
        # never touches the output; weight files carry it, so it is kept, and not trained
        self.register_buffer("pooler_weight", torch.randn(dim, dim) * 0.02)
        self.register_buffer("pooler_bias", torch.zeros(dim))
        init_vit_weights(self)

    def reset_constants(self) -> None:
        """Fill the buffers that no file holds: after `to_empty` they hold nothing."""
        self.mean.copy_(torch.tensor(IMAGE_MEAN).view(3, 1, 1))
        self.std.copy_(torch.tensor(IMAGE_STD).view(3, 1, 1))

    @property
    def num_sparse_tokens(self) -> int:
        return self.sparse_tokens.shape[0]

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches in height and width; a remainder at the right and bottom is ignored."""
        return images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size

    def position(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, 1 + P, D), resized bicubically where the grid is not the trained one."""
        side = self.config.grid_side
        if grid == (side, side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(at_least_fp32(patches), size=grid, mode="bicubic", align_corners=False)
        return torch.cat((cls, patches.flatten(2).mT.to(cls.dtype)), dim=1)

    def tokens(self, images: Tensor, keep_indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the transformer.

        Args:
            images: (B, 3, H, W) uint8, or floating in [0, 1].
            keep_indices: (B, kept) int64 patches that stay; position is added before the others are dropped.

        Returns:
            cls (B, 1, D), dense (B, P or kept, D), sparse (B, K, D).
        """
        check_images(images, self.config.patch_size)
        dtype = self.patch_embed.weight.dtype
        pixels = to_unit_range(images, dtype)
        grid = self.grid(images)
        position = self.position(grid)
        patches = self.patch_embed((pixels - self.mean) / self.std).flatten(2).mT + position[:, 1:]
        if keep_indices is not None:
            check_keep_indices(keep_indices, images.shape[0], patches.shape[1])
            patches = patches.gather(1, keep_indices[..., None].expand(-1, -1, patches.shape[-1]))
        B = images.shape[0]
        cls = (self.cls_token + position[:, :1]).expand(B, -1, -1)
        x = self.transformer(torch.cat((cls, patches, self.sparse_tokens.expand(B, -1, -1)), dim=1))
        # three slices, not one split: a view of several outputs is replayed wrongly after a graph break (torch 2.13)
        K = self.num_sparse_tokens
        return x[:, :1], x[:, 1:-K], x[:, -K:]


class StellarEncoder(UpstreamWeightsMixin, SparseViT, HubMixin):
    """STELLAR's encoder: an image becomes K sparse tokens ("what") and a localization matrix ("where").

    Args:
        config: sizes, or a preset's name ("b16", "l16", "h16", "b8", "b24", "s16", "tiny"; "stellar-b16" means "b16").
        num_sparse_tokens: K; None takes the preset's (16 where it names none).
        spatial_temp: temperature of the localization; None takes a scaled dot product without normalisation.

    Calling it with images returns a `StellarOutput`. Images are (B, 3, H, W) RGB, uint8 or floating point in [0, 1] and
    not normalised, of any height and width of at least one patch; anything else raises ValueError.

    Source: "Learning Sparse Visual Representations via Spatial-Semantic Factorization" (arXiv 2602.01905).
    """

    _absent_prefixes = (
        *("decoder.", "decoder_proj.", "reconstruction_head.", "position_embedding."),
        *("clustering_head.", "cls_cluster_head.", "teacher_", "tokenizer."),
    )

    def __init__(
        self,
        config: EncoderConfig | str = "b16",
        num_sparse_tokens: int | None = None,
        spatial_temp: float | None = 0.06,
    ) -> None:
        if isinstance(config, str):
            preset = resolve_preset(config)
            config = preset.encoder
            if num_sparse_tokens is None:
                num_sparse_tokens = preset.model.get("num_sparse_tokens")
        super().__init__(config, 16 if num_sparse_tokens is None else num_sparse_tokens)
        if spatial_temp is not None and not spatial_temp > 0:
            raise ValueError(f"spatial_temp must be positive or None but is {spatial_temp}")
        self.spatial_temp = spatial_temp
        self.dense_proj = Linear(config.hidden_size, config.hidden_size)
        self.sparse_proj = Linear(config.hidden_size, config.hidden_size)
        init_vit_weights(self.dense_proj)
        init_vit_weights(self.sparse_proj)

    def config_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes; a StellarModel's has these entries too."""
        return {
            "encoder": config_dict(self.config),
            "num_sparse_tokens": self.num_sparse_tokens,
            "spatial_temp": self.spatial_temp,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "StellarEncoder":
        """Build an encoder from `config_dict`, or from a StellarModel's config."""
        arguments = {name: config[name] for name in ("num_sparse_tokens", "spatial_temp") if name in config} | overrides
        if "encoder" not in config:
            raise ValueError(f"the config has no 'encoder', only {', '.join(config) or 'nothing'}")
        encoder = build_from(EncoderConfig, config["encoder"], "encoder")
        return build_from(cls, {"config": encoder, **arguments}, "encoder")

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward of a training-mode pass instead of keeping them."""
        self.transformer.gradient_checkpointing = enable

    def localize(self, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factorise: returns lowrank (B, P, D), spatial (B, P, K), peak_dist (B, K)."""
        lowrank, spatial, peak = lowrank_product(
            self.dense_proj(dense),
            self.sparse_proj(sparse),
            sparse,
            temperature=self.spatial_temp,
            return_localization=True,
        )
        assert spatial is not None  # asked for
        return lowrank, spatial, peak

    def forward(self, images: Tensor, keep_indices: Tensor | None = None) -> StellarOutput:
        """Encode images; with `keep_indices` (B, kept) only those patches enter, and `grid` is (1, kept)."""
        cls, dense, sparse = self.tokens(images, keep_indices)
        lowrank, spatial, peak = self.localize(dense, sparse)
        grid = self.grid(images) if keep_indices is None else (1, keep_indices.shape[1])
        return StellarOutput(cls, sparse, dense, spatial, lowrank, peak, grid)
