"""Launch knobs of packed_patch_embed's Triton kernels. D width.

Registers, spills and shared memory: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import SHARED_BYTES, dot_size


@dataclass(frozen=True)
class Tile:
    """Patches, columns and values of a patch that one step of the projection takes, its threads and pipeline stages."""

    block_r: int
    block_d: int
    block_i: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Gather:
    """Patches and values of each that a program of the backward copies, and its threads."""

    block_r: int
    block_i: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    forward: Tile
    backward: Gather


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """`dtype` is the projection's; `device` makes no difference.

    64 patches are what Hopper's tensor cores take at least. 8 warps for 64 x 128 sums need at most 128 registers a
    thread at p = 16 on all three architectures, so that two programs share a multiprocessor and one normalises while
    the other multiplies; with 128 x 128 it is one, and 128 x 256 spills. Products of fp32 hold three parts of each
    operand, hence smaller tiles; slices of 16 values take them from 254 registers to 172 on sm_80. Chosen by these
    figures and not by a clock.
    """
    tile = Tile(64, 64, 16, 4, 3) if dtype == torch.float32 else Tile(64, 128, 32, 8, 3)
    return Config(_fitted(tile, shape), Gather(32, 64, 4))


def _fitted(tile: Tile, shape: Mapping[str, int]) -> Tile:
    """No wider than the tokens, padded to a power of two of at least 16, tl.dot's smallest."""
    return replace(tile, block_d=min(tile.block_d, dot_size(shape["D"])))


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    found = [start]
    for tile in product((64, 128), (64, 128, 256), (16, 32, 64), (4, 8), (2, 3, 4)):
        found.append(replace(start, forward=_fitted(Tile(*tile), shape)))
    for gather in product((8, 16, 32, 64), (32, 64, 128), (4, 8)):
        found.append(replace(start, backward=Gather(*gather)))
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, fit in shared memory, and probably in registers."""
    tile, gather = config.forward, config.backward
    blocks = (tile.block_r, tile.block_d, tile.block_i)
    if any(block < 16 or block & (block - 1) for block in blocks) or tile.num_warps not in (4, 8):
        return False
    # slices in flight, pixels at up to 4 bytes; one as operands; and, once they are done, the sums change their layout
    slices = tile.num_stages * tile.block_i * (4 * tile.block_r + dtype.itemsize * tile.block_d)
    operands = dtype.itemsize * tile.block_i * (tile.block_r + tile.block_d)
    if max(slices + operands, 4 * tile.block_r * tile.block_d) > SHARED_BYTES:
        return False
    # sums that a thread holds, as many as did not spill
    if tile.block_r * tile.block_d // (32 * tile.num_warps) > (32 if dtype == torch.float32 else 64):
        return False
    values = gather.block_r * gather.block_i
    return values & (values - 1) == 0 and gather.num_warps in (1, 2, 4, 8) and values <= 64 * 32 * gather.num_warps
