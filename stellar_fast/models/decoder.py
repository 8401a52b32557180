"""The decoder: low-rank image embedding to pixels or to VQ codes. B images, P patches, H decoder width."""

import torch
from torch import Tensor, nn

from stellar_fast.models.config import DecoderConfig
from stellar_fast.nn.fourier_position import FourierPosition
from stellar_fast.nn.linear import Linear
from stellar_fast.nn.vit import Transformer, init_vit_weights


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
        self.config = config
        dim = config.hidden_size
        self.proj = Linear(embed_dim, dim)
        self.position = FourierPosition(dim)
        self.transformer = Transformer(
            dim, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        )
        self.head: nn.Module = (
            nn.ConvTranspose2d(dim, 3, patch_size, patch_size) if num_codes is None else Linear(dim, num_codes)
        )
        init_vit_weights(self)
        # never touch the output; weight files carry them, so they are kept, and not trained
        num_positions = 1 + config.grid_side**2
        self.register_buffer("cls_token", torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("pos_embed", torch.randn(1, num_positions, dim) * 0.02)
        self.register_buffer("patch_embed_weight", torch.randn(dim, 3, config.patch_size, config.patch_size) * 0.02)
        self.register_buffer("patch_embed_bias", torch.zeros(dim))
        self.register_buffer("pooler_weight", torch.randn(dim, dim) * 0.02)
        self.register_buffer("pooler_bias", torch.zeros(dim))

    def forward(self, lowrank_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return pixels (B, 3, height, width), or code logits (B, P, codes)."""
        dtype = self.proj.weight.dtype
        x = self.transformer(self.proj(lowrank_BPD.to(dtype)) + self.position(grid).to(dtype))
        if isinstance(self.head, nn.ConvTranspose2d):
            x = x.mT.unflatten(2, grid)
        return self.head(x)
