"""MaskGIT-VQGAN, frozen: images to codes and back. B images, h x w codes, E code width."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.models.config import VQGANConfig
from stellar_fast.models.weight_files import load_tensors
from stellar_fast.models.weights import Transfer, about, fit_names
from stellar_fast.nn.conv2d import Conv2d
from stellar_fast.nn.group_norm_silu import GroupNormSiLU
from stellar_fast.nn.plain import is_plain, is_watched
from stellar_fast.nn.upsample_conv2x import UpsampleConv2x
from stellar_fast.ops.checks import autocast_dtype, channels_last, values_are_checked
from stellar_fast.ops.from_weight import weights_at_rest
from stellar_fast.ops.nearest_code import nearest_code

NORM_GROUPS, NORM_EPS = 32, 1e-6
# Of the largest activation. An image of 256 x 256 has 32 MiB in fp32; kept memory and glibc's reuse end there.
CHUNK_BYTES = 31 * 2**20


def _norm(channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(NORM_GROUPS, channels, eps=NORM_EPS)


class Features(NamedTuple):
    """An activation (B, C, H, W), as a sum that its next normalisation forms, and its statistics where known.

    One that is `watched` may be kept by somebody: its memory, and that of what is made of it, is not used again.
    """

    x: Tensor
    addend: Tensor | None = None
    stats: Tensor | None = None
    watched: bool = False

    def sum(self) -> Tensor:
        return self.x if self.addend is None else self.x + self.addend


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice.

    Where the width changes, the shortcut reads the second convolution's output: an upstream quirk that the published
    weights depend on.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, features: Features) -> Features:
        watched = features.watched
        h, x = self.norm1(*features[:3], transient=not watched)
        plain = is_plain(self.conv1, Conv2d)  # others are called
        h, stats = self.conv1.with_stats(h, NORM_GROUPS) if plain else (self.conv1(h), None)
        h, _ = self.norm2(h, None, stats, transient=not watched)
        if hasattr(self, "nin_shortcut"):
            h = self.conv2(h)
            return Features(h, self.nin_shortcut(h), watched=watched)
        if watched or not is_plain(self.conv2, Conv2d):
            return Features(self.conv2(h), x, watched=watched)
        return Features(*self.conv2.add(h, x, NORM_GROUPS))


class Level(nn.Module):
    """Residual blocks of one resolution; a decoder level above the finest ends in nearest x2 and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, upsample: bool = False) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(i, o) for i, o in pairwise(widths))
        if upsample:
            self.upsample_conv = UpsampleConv2x(out_channels, out_channels)

    def forward(self, features: Features) -> Features:
        for block in self.block:
            features = block(features)
        if hasattr(self, "upsample_conv"):
            x, stats = self.upsample_conv(features.sum(), stats_groups=NORM_GROUPS)
            features = Features(x, stats=stats, watched=features.watched)
        return features


class Encoder(nn.Module):
    """Image (B, 3, H, W) to z (B, E, h, w)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in (1, *config.channel_mult)]
        self.conv_in = Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(i, o, config.num_res_blocks) for i, o in pairwise(widths))
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        self.norm_out = _norm(widths[-1])
        self.conv_out = Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        watched = is_watched(self)
        features = Features(self.conv_in(channels_last(x)), watched=watched)
        for i, level in enumerate(self.down):
            features = level(features)
            if i < len(self.down) - 1:
                features = Features(F.avg_pool2d(features.sum(), 2), watched=watched)
        for block in self.mid:
            features = block(features)
        return self.conv_out(self.norm_out(*features[:3], transient=not watched)[0])


class Decoder(nn.Module):
    """z (B, E, h, w) to image (B, 3, H, W); `up.0` is the finest level and runs last."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_mult]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        self.up = nn.ModuleList(
            Level(inputs[i], widths[i], config.num_res_blocks, upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        watched = is_watched(self)
        features = Features(self.conv_in(channels_last(z)), watched=watched)
        for block in self.mid:
            features = block(features)
        for level in reversed(self.up):
            features = level(features)
        return self.conv_out(self.norm_out(*features[:3], transient=not watched)[0])


class Quantizer(nn.Module):
    """Holds the codebook."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_embeddings, config.z_channels)


class VQGAN(nn.Module):
    """Frozen MaskGIT-VQGAN (arXiv 2202.04200): RGB in [0, 1], not normalised further, to a grid of codes and back.

    Its parameters need no gradient, but gradients pass through to its input.
    """

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQGANConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quantize = Quantizer(self.config)
        self.requires_grad_(False)
        self.eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images.

        Args:
            images: (B, 3, H, W) floating in [0, 1]; H and W multiples of 16 (of `config.downscale`).

        Returns:
            (B, H / 16, W / 16) int64.

        Raises:
            ValueError: another shape.
        """
        channels, step = self.config.num_channels, self.config.downscale
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"images must be (B, {channels}, H, W), sides multiples of {step}, not {tuple(images.shape)}"
            )
        z = self._in_chunks(self.encoder, images, 1)
        codes = nearest_code(z.permute(0, 2, 3, 1).flatten(0, 2), self.quantize.embedding.weight)
        return codes.view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes: (B, h, w) int64 below `config.num_embeddings`.

        Returns:
            (B, 3, 16 h, 16 w), clamped to [0, 1].

        Raises:
            ValueError: another shape or dtype; a code that the codebook does not have (on a CPU, elsewhere only under
                STELLAR_FAST_CHECK=1).
        """
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be (B, h, w) int64 but are {tuple(codes.shape)} {codes.dtype}")
        size = self.config.num_embeddings
        if values_are_checked(codes) and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes span [{int(codes.min())}, {int(codes.max())}] but the codebook has {size} entries")
        z = self.quantize.embedding(codes).permute(0, 3, 1, 2)
        return self._in_chunks(self.decoder, z, self.config.downscale).clamp(0, 1)

    def _in_chunks(self, network: nn.Module, x: Tensor, scale: int) -> Tensor:
        """Apply a network to images whose sides are `scale` times x's.

        On a CPU a few at a time where no gradient is kept: its memory is that of a chunk, nearer to the cache.
        """
        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad) or not len(x):
            return network(x)
        itemsize = (autocast_dtype(x.device) or x.dtype).itemsize
        image_bytes = x.shape[2] * x.shape[3] * scale**2 * self.config.hidden_channels * itemsize
        with weights_at_rest():
            return torch.cat([network(part) for part in x.split(max(1, CHUNK_BYTES // image_bytes))])

    @classmethod
    def from_pretrained(cls, path: str | Path, config: VQGANConfig | None = None) -> "VQGAN":
        """Load a state dict, such as the published `maskgit-vqgan-imagenet-f16-256.bin`, or safetensors.

        Args:
            path: of the file; pickled files are read with weights_only=True. Of a whole STELLAR model's file, whose
                names begin with `tokenizer.`, those are taken.
            config: sizes; None takes the published model's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or values that are NaN or infinite.
            WeightsMismatchError: a RuntimeError; missing, unexpected or misshapen tensors, named.
        """
        held = load_tensors(path)
        model = cls(config)
        ours = model.state_dict(keep_vars=True)
        with about(path):
            entries = fit_names(held, [f"tokenizer.{name}" for name in ours])
            part = "tokenizer." if any(name.startswith("tokenizer.") for name in entries) else ""
            transfer = Transfer(entries if part else fit_names(held, ours))
            for name, tensor in ours.items():
                transfer.take(tensor, [part + name])
            transfer.unexpected = sorted(name for name in transfer.tensors if name.startswith(part))
            transfer.check()
            transfer.fill()
        return model
