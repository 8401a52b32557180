"""The encoder: a ViT whose sequence ends in K sparse tokens, and the factorisation of its output.

B images, P patches of a (height, width) grid, K sparse tokens, D width.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.models.config import EncoderConfig, build_from, config_dict, resolve_preset
from stellar_fast.models.hub import HubMixin
from stellar_fast.models.output import StellarOutput
from stellar_fast.models.weights import UpstreamWeightsMixin
from stellar_fast.nn.linear import Linear
from stellar_fast.nn.plain import input_dtype, is_plain
from stellar_fast.nn.vit import Rows, Sequences, Transformer, init_vit_weights
from stellar_fast.ops.lowrank_product import lowrank_product
from stellar_fast.ops.packed_patch_embed import (
    check_images,
    check_keep_indices,
    packed_patch_embed,
    to_unit_range,
)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


ROWS = ("all", "cls", "cls+sparse")


class ViewBatch(NamedTuple):
    """Images of one kind, and which of their tokens are read afterwards; the rest of the last block is not computed.

    Attributes:
        images: (N, 3, H, W) uint8, or floating in [0, 1].
        keep_indices: (N, kept) int64 patches that stay; None keeps all. Each has the position of its place in it.
        rows: "all", "cls" or "cls+sparse".
    """

    images: Tensor
    keep_indices: Tensor | None = None
    rows: str = "all"


class ViewOutput(NamedTuple):
    """Tokens of one ViewBatch; None is what its `rows` leave out.

    Attributes:
        cls: (N, 1, D).
        sparse: (N, K, D).
        dense: (N, P or kept, D).
        query: (N, P or kept, D), `dense_proj` of dense: what `lowrank_product` localizes. A StellarEncoder's alone.
        key: (N, K, D), `sparse_proj` of sparse. A StellarEncoder's alone.
    """

    cls: Tensor
    sparse: Tensor | None = None
    dense: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


class SparseViT(nn.Module):
    """ViT over [CLS, patches + position, K sparse tokens]; all tokens attend to all."""

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
        # never touches the output; weight files carry it, so it is kept, and not trained
        self.register_buffer("pooler_weight", torch.randn(dim, dim) * 0.02)
        self.register_buffer("pooler_bias", torch.zeros(dim))
        init_vit_weights(self)

    @property
    def mean(self) -> Tensor:
        """Mean of the colours that the encoder normalises with, (3, 1, 1), at least fp32: a copy."""
        return self._constant(IMAGE_MEAN).clone().view(3, 1, 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the colours, as `mean`."""
        return self._constant(IMAGE_STD).clone().view(3, 1, 1)

    def _constant(self, values: tuple[float, ...]) -> Tensor:
        """Numbers where the weights are. No buffer: whatever builds, casts, moves or loads a module loses none."""
        dtype = torch.promote_types(self.pos_embed.dtype, torch.float32)
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return torch.tensor(values, dtype=dtype, device=self.pos_embed.device)
        return _kept_constant(values, dtype, self.pos_embed.device)

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

    def forward(self, views: Sequence[ViewBatch]) -> list[ViewOutput]:
        """Run the transformer over all views in one pass of packed sequences."""
        if not isinstance(views, Sequence):
            raise ValueError(f"pass a tensor of images or a list of ViewBatch, not {type(views).__name__}")
        if not views:
            raise ValueError("there are 0 views: pass at least one ViewBatch")
        grids = [self._check(view) for view in views]
        x = self._embed(views, [self.position(grid)[0] for grid in grids])
        K, device = self.num_sparse_tokens, x.device
        counts = [view.images.shape[0] for view in views]
        patches = [
            g[0] * g[1] if v.keep_indices is None else v.keep_indices.shape[1]
            for v, g in zip(views, grids, strict=True)
        ]
        sequences = Sequences.of([(N, 1 + P + K) for N, P in zip(counts, patches, strict=True)], device)
        rows = None
        if any(view.rows != "all" for view in views):
            kept = [_kept_positions(view.rows, P, K, device) for view, P in zip(views, patches, strict=True)]
            rows = Rows.of(sequences, kept)
        x = self.transformer(x, sequences, rows)
        lengths = [group[1] for group in (sequences if rows is None else rows).groups]
        pieces = x.split([N * length for N, length in zip(counts, lengths, strict=True)])
        outputs = []
        for piece, view, N, length in zip(pieces, views, counts, lengths, strict=True):
            tokens = piece.view(N, length, piece.shape[-1])
            cls = _owned(tokens[:, :1])
            sparse = None if view.rows == "cls" else _owned(tokens[:, -K:])
            outputs.append(ViewOutput(cls, sparse, _owned(tokens[:, 1:-K]) if view.rows == "all" else None))
        return outputs

    def _embed(self, views: Sequence[ViewBatch], positions: list[Tensor]) -> Tensor:
        """The sequences of all views, one after another, (T, D)."""
        conv, mean, std = self.patch_embed, self._constant(IMAGE_MEAN), self._constant(IMAGE_STD)
        if not (is_plain(conv, nn.Conv2d) and conv.bias is not None and _cuts_patches(conv, self.config.patch_size)):
            mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
            pairs = zip(views, positions, strict=True)
            return torch.cat([self._embed_by_call(view, position, mean, std) for view, position in pairs])
        return packed_patch_embed(
            [view.images for view in views],
            conv.weight,
            conv.bias,
            positions,
            self.cls_token[0, 0],
            self.sparse_tokens,
            mean=mean,
            std=std,
            keep_indices=[view.keep_indices for view in views],
        )

    def _embed_by_call(self, view: ViewBatch, position: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """The sequences of one view through a `patch_embed` that somebody wrapped, replaced or hooked: all patches."""
        images, keep, N = view.images, view.keep_indices, len(view.images)
        check_images(images, self.config.patch_size)
        pixels = (to_unit_range(images, mean.dtype) - mean) / std
        patches = self.patch_embed(pixels.to(input_dtype(self.patch_embed, mean)))
        expected = (N, position.shape[1], *self.grid(images))
        if patches.shape != expected:
            raise ValueError(f"patch_embed returned {tuple(patches.shape)} but the encoder needs {expected}")
        patches, places = patches.flatten(2).mT, position[1:]
        if keep is not None:
            check_keep_indices(keep, N, patches.shape[1])
            patches = patches.take_along_dim(keep[..., None], 1)
            places = F.embedding(keep, places)  # its gradient is summed in one order, an index's is not
        cls = (self.cls_token[0] + position[:1]).expand(N, 1, -1)
        return torch.cat((cls, patches + places, self.sparse_tokens.expand(N, -1, -1)), dim=1).flatten(0, 1)

    def _check(self, view: ViewBatch) -> tuple[int, int]:
        """The view's grid of patches."""
        if not isinstance(view, ViewBatch):
            raise ValueError(f"views must be ViewBatch but one is {type(view).__name__}")
        if view.rows not in ROWS:
            raise ValueError(f"rows must be one of {', '.join(map(repr, ROWS))} but is {view.rows!r}")
        check_images(view.images, self.config.patch_size, values=False)  # the operator reads the values
        return self.grid(view.images)


@functools.cache
def _kept_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once, so that a GPU waits for no copy; one made in inference mode could not be used in training."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _cuts_patches(conv: nn.Conv2d, side: int) -> bool:
    """Whether a convolution maps each patch for itself."""
    patch = (side, side)
    return (
        conv.kernel_size == conv.stride == patch
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _owned(tokens: Tensor) -> Tensor:
    """Without gradient a copy: who keeps some tokens is not to keep the memory of all. Training keeps all anyway."""
    return tokens if tokens.requires_grad else tokens.clone(memory_format=torch.contiguous_format)


def _kept_positions(rows: str, num_patches: int, num_sparse_tokens: int, device: torch.device) -> Tensor:
    """Places in a sequence [CLS, patches, sparse tokens] that `rows` names."""
    positions = torch.arange(1 + num_patches + num_sparse_tokens, device=device)
    if rows == "all":
        return positions
    return positions[:1] if rows == "cls" else torch.cat((positions[:1], positions[-num_sparse_tokens:]))


class StellarEncoder(UpstreamWeightsMixin, SparseViT, HubMixin):
    """STELLAR's encoder: an image becomes K sparse tokens ("what") and a localization matrix ("where").

    Args:
        config: sizes, or a preset's name ("b16", "l16", "h16", "b8", "b24", "s16", "tiny"; "stellar-b16" means "b16").
        num_sparse_tokens: K; None takes the preset's (16 where it names none).
        spatial_temp: temperature of the localization; None takes a scaled dot product without normalisation.

    Calling it with images returns a `StellarOutput`; with a list of ViewBatch, what training needs, in one pass.
    Images are (B, 3, H, W) RGB, uint8 or floating point in [0, 1] and not normalised, of any height and width of at
    least one patch; anything else raises ValueError.

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

    @overload  # type: ignore[override]
    def forward(self, images: Tensor, keep_indices: Tensor | None = None) -> StellarOutput: ...

    @overload
    def forward(self, images: Sequence[ViewBatch]) -> list[ViewOutput]: ...

    def forward(
        self, images: Tensor | Sequence[ViewBatch], keep_indices: Tensor | None = None
    ) -> StellarOutput | list[ViewOutput]:
        """Encode images, or several kinds of views in one pass.

        Args:
            images: (B, 3, H, W), or a list of ViewBatch, as training has them.
            keep_indices: (B, kept) int64 with images: only those patches enter, and `grid` is (1, kept).

        Returns:
            A `StellarOutput`; for a list one `ViewOutput` each, with the rows that were asked for.

        Raises:
            ValueError: images of a wrong kind, patches that they do not have, unknown rows.
        """
        if not isinstance(images, Tensor):
            if keep_indices is not None:
                raise ValueError("keep_indices belong into each ViewBatch when views are given")
            return [self._with_projections(output) for output in super().forward(images)]
        output = self._with_projections(super().forward([ViewBatch(images, keep_indices)])[0])
        assert output.query is not None and output.key is not None
        assert output.sparse is not None and output.dense is not None
        lowrank, spatial, peak = lowrank_product(
            output.query, output.key, output.sparse, temperature=self.spatial_temp, return_localization=True
        )
        assert spatial is not None  # asked for
        grid = self.grid(images) if keep_indices is None else (1, keep_indices.shape[1])
        return StellarOutput(output.cls, output.sparse, output.dense, spatial, lowrank, peak, grid)

    def _with_projections(self, output: ViewOutput) -> ViewOutput:
        if output.dense is None:
            return output
        return output._replace(query=self.dense_proj(output.dense), key=self.sparse_proj(output.sparse))
