"""The decoder: low-rank image embedding to pixels or to VQ codes. B images, P patches, H decoder width."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast
from stellar_fast.models.config import DecoderConfig
from stellar_fast.nn.fourier_position import FourierPosition
from stellar_fast.nn.linear import Linear
from stellar_fast.nn.patch_unembed import PatchUnembed
from stellar_fast.nn.plain import input_dtype, is_plain
from stellar_fast.nn.vit import Sequences, Transformer, init_vit_weights
from stellar_fast.ops.checks import autocast_dtype
from stellar_fast.ops.lowrank_product import lowrank_product


class Localizer(NamedTuple):
    """What places tokens on patches: query (B, P, D) and key (B, K, D) before normalisation, see `lowrank_product`."""

    query: Tensor
    key: Tensor
    temperature: float | None


class Decoder(nn.Module):
    """ViT over the patches of the low-rank embedding, with one of two heads.

    Args:
        config: sizes.
        embed_dim: D, width of the low-rank embedding.
        patch_size: of the encoder, in pixels.
        num_codes: codebook size for the head over VQ codes; None takes the head over pixels.
    """

    def __init__(self, config: DecoderConfig, embed_dim: int, patch_size: int, num_codes: int | None) -> None:
        super().__init__()
        self.config, self.num_codes = config, num_codes
        dim = config.hidden_size
        self.proj = Linear(embed_dim, dim)
        self.position = FourierPosition(dim)
        self.transformer = Transformer(
            dim, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        )
        self.head: nn.Module = PatchUnembed(dim, 3, patch_size) if num_codes is None else Linear(dim, num_codes)
        init_vit_weights(self)
        # never touch the output; weight files carry them, so they are kept, and not trained
        num_positions = 1 + config.grid_side**2
        self.register_buffer("cls_token", torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("pos_embed", torch.randn(1, num_positions, dim) * 0.02)
        self.register_buffer("patch_embed_weight", torch.randn(dim, 3, config.patch_size, config.patch_size) * 0.02)
        self.register_buffer("patch_embed_bias", torch.zeros(dim))
        self.register_buffer("pooler_weight", torch.randn(dim, dim) * 0.02)
        self.register_buffer("pooler_bias", torch.zeros(dim))

    def forward(self, sparse_BKD: Tensor, where: Localizer | Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode tokens at their places.

        The projection is pushed through the low-rank product, ``proj(L S) = L (S W^T) + b``: K rows are projected, not
        P, and the low-rank embedding is never written.

        Args:
            sparse_BKD: the tokens.
            where: how to localize them, or the localization matrix (B, P, K) itself.
            grid: patches in height and width.

        Returns:
            pixels (B, 3, height, width) or code logits (B, P, codes); the localization matrix, (B, P, K) fp32.
        """
        if is_plain(self.proj, Linear) and self.proj.bias is not None:
            weight = self.proj.weight
            value, bias = F.linear(sparse_BKD.to(weight.dtype), weight), at_least_fp32(self.proj.bias)
            x, spatial = self._lowrank(value, where, at_least_fp32(self.position(grid)) + bias)
            x = x.to(weight.dtype)
        else:  # somebody wrapped or replaced it: P rows are projected
            lowrank, spatial = self._lowrank(sparse_BKD, where)
            x = self.proj(lowrank.to(input_dtype(self.proj, sparse_BKD)))
            stream = at_least_fp32(x) if autocast_dtype(x.device) is not None else x
            x = (at_least_fp32(x) + at_least_fp32(self.position(grid))).to(stream.dtype)
        B, P, H = x.shape
        x = self.transformer(x.flatten(0, 1), Sequences.of([(B, P)], x.device)).view(B, P, H)
        return self._to_head(x, grid), spatial

    @staticmethod
    def _lowrank(value_BKE: Tensor, where: Localizer | Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L value + bias (B, P, E), and L (B, P, K) in fp32."""
        if not isinstance(where, Tensor):
            x, spatial, _ = lowrank_product(
                where.query, where.key, value_BKE, temperature=where.temperature, bias=bias, return_localization=True
            )
            assert spatial is not None  # asked for
            return x, spatial
        spatial = at_least_fp32(where)
        with without_autocast(spatial):  # fp32, as in training
            x = spatial @ at_least_fp32(value_BKE)
            return x if bias is None else x + bias, spatial

    def _to_head(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.num_codes is not None:
            return self.head(x)
        if isinstance(self.head, nn.ConvTranspose2d) and not isinstance(self.head, PatchUnembed):
            return self.head(x.mT.unflatten(2, grid))
        return self.head(x, grid)
