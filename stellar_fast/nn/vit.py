"""Pre-norm vision transformer over packed sequences.

T rows of all sequences one after another, D width. A block gives the residual stream and its last branch apart: the
next norm adds them, in one pass over memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stellar_fast.nn.add_layer_norm import AddLayerNorm, add_norm
from stellar_fast.nn.linear import Linear, gelu_of_linear, linear_of_gelu
from stellar_fast.nn.plain import is_plain
from stellar_fast.ops.linear import linear
from stellar_fast.ops.token_attention import cu_seqlens, token_attention, token_self_attention


class Sequences(NamedTuple):
    """How rows belong together: `groups` (sequences, length, length) on the host, `starts` their row ranges."""

    groups: tuple[tuple[int, int, int], ...]
    starts: Tensor

    @classmethod
    def of(cls, lengths: list[tuple[int, int]], device: torch.device) -> "Sequences":
        """From (sequences, length) of each run of equal lengths."""
        groups = tuple((count, length, length) for count, length in lengths)
        return cls(groups, cu_seqlens(groups, 1, device))


class Rows(NamedTuple):
    """Those rows that are read after the last block: `places` (R,) int64, ascending, and how many of each sequence."""

    places: Tensor
    groups: tuple[tuple[int, int, int], ...]
    starts: Tensor

    @classmethod
    def of(cls, sequences: Sequences, kept: list[Tensor]) -> "Rows":
        """From the positions that are kept in the sequences of each group."""
        at, places, groups = 0, [], []
        for (count, length, _), positions in zip(sequences.groups, kept, strict=True):
            first = at + length * torch.arange(count, device=positions.device)
            places.append((first[:, None] + positions).flatten())
            groups.append((count, positions.shape[0], length))
            at += count * length
        return cls(torch.cat(places), tuple(groups), cu_seqlens(groups, 1, sequences.starts.device))


class Attention(nn.Module):
    """Multi-head attention within each sequence, with one fused qkv projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x_TD: Tensor, sequences: Sequences, rows: Rows | None = None) -> Tensor:
        """With `rows` only those ask, of all; returns their outputs."""
        if rows is None:
            qkv = self.qkv(x_TD).unflatten(-1, (3, self.num_heads, -1))
            return self.proj(token_self_attention(qkv, sequences.starts, groups=sequences.groups).flatten(1))
        D, qkv = x_TD.shape[1], self.qkv
        if is_plain(qkv, Linear) and qkv.bias is not None:  # the queries of those rows alone
            weights, biases = qkv.weight.split((D, 2 * D)), qkv.bias.split((D, 2 * D))
            q = linear(x_TD[rows.places], weights[0], biases[0]).unflatten(-1, (self.num_heads, -1))
            k, v = linear(x_TD, weights[1], biases[1]).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        else:
            q, k, v = qkv(x_TD).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            q = q[rows.places]
        return self.proj(token_attention(q, k, v, rows.starts, sequences.starts, groups=rows.groups).flatten(1))


class MLP(nn.Module):
    """Two linears with an exact (erf) GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the backward needs what enters the GELU: keep that, and not what leaves it
            return linear_of_gelu(self.fc2, self.fc1(x))
        return self.fc2(gelu_of_linear(self.fc1, x))


class Block(nn.Module):
    """Pre-norm transformer block; the residual stream keeps its dtype under autocast."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = AddLayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden_dim)

    def forward(
        self, stream: Tensor, branch: Tensor | None, sequences: Sequences, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (stream, branch), each (T, D), or (R, D) of `rows` alone; their sum is the block's output."""
        stream, normed = add_norm(self.norm1, stream, branch)
        attended = self.attn(normed, sequences, rows)
        if rows is not None:
            stream = stream[rows.places]
        stream, normed = add_norm(self.norm2, stream, attended)
        return stream, self.mlp(normed)


class Transformer(nn.Module):
    """A stack of blocks and the final LayerNorm, with optional activation checkpointing."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden_dim, eps) for _ in range(num_layers))
        self.norm = AddLayerNorm(dim, eps=eps)

    def forward(self, x_TD: Tensor, sequences: Sequences, rows: Rows | None = None) -> Tensor:
        """Return the normed output (T, D), or (R, D) of `rows` alone: nothing else is computed of the last block."""
        stream, branch = x_TD, None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            arguments = stream, branch, sequences, rows if i == last else None
            if self.gradient_checkpointing and self.training:
                stream, branch = checkpoint(block, *arguments, use_reentrant=False)
                stream, branch = stream + branch, None  # keep one tensor a block, not two
            else:
                stream, branch = block(*arguments)
        return add_norm(self.norm, stream, branch)[1]


def init_vit_weights(module: nn.Module) -> None:
    """Normal of std 0.02 for linears and convolutions, zero biases: the usual start of a ViT."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
