"""The frozen MaskGIT-VQGAN: image (B, 3, H, W) in [0, 1] to codes (B, H/16, W/16) and back."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        # The published weights were trained with the shortcut on the block's own output, not on its input.
        return x + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else residual)


class Level(nn.Module):
    """The residual blocks of one resolution, and the convolution after the upsampling where there is one."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(blocks)
        )
        if upsample:
            self.upsample_conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, num_channels: int, z_channels: int) -> None:
        super().__init__()
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = nn.Conv2d(num_channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, blocks) for a, b in zip(inputs, widths, strict=True))
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(blocks))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, num_channels: int, z_channels: int) -> None:
        super().__init__()
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(blocks))
        pairs = zip(inputs, widths, strict=True)
        self.up = nn.ModuleList(Level(a, b, blocks, upsample=i > 0) for i, (a, b) in enumerate(pairs))
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], num_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for i, level in reversed(list(enumerate(self.up))):
            x = level(x)
            if i > 0:
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class PlainVQGAN(nn.Module):
    """Frozen tokenizer with the published state-dict names."""

    def __init__(
        self,
        hidden_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_channels: int = 3,
        z_channels: int = 256,
        codebook_size: int = 1024,
    ) -> None:
        super().__init__()
        widths = [hidden_channels * m for m in channel_mult]
        self.encoder = Encoder(widths, num_res_blocks, num_channels, z_channels)
        self.decoder = Decoder(widths, num_res_blocks, num_channels, z_channels)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codebook_size, z_channels)})
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, h, w) int64: the codebook entry nearest in squared L2."""
        z = self.encoder(images).permute(0, 2, 3, 1)
        rows, codebook = z.flatten(0, 2).float(), self.quantize["embedding"].weight
        distance = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.t()
        return distance.argmin(dim=1).view(z.shape[:3])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Image (B, 3, 16h, 16w) in [0, 1] of codes (B, h, w)."""
        z = self.quantize["embedding"](codes).permute(0, 3, 1, 2)
        return self.decoder(z).clamp(0, 1)
