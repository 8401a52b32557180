"""Launch knobs of koleo's Triton kernels. Letters as in kernel.py.

Registers and spills: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import dot_size


@dataclass(frozen=True)
class Tile:
    """Width of the slices that a program takes an image's tokens in, and its threads."""

    block_d: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    forward: Tile
    backward: Tile


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """Slices in loads of 128 bits with half the registers or less of a thread; `device` makes no difference.

    A program is one image and walks through its slices one after the other, twice, so that it is other programs on the
    multiprocessor that hide its waits: with slices twice as wide the kernels took 120 to 250 registers. The three
    parts of an fp32 product take most of them, in the backward of 16-bit tokens too, whose differences are fp32.
    """
    widest = dot_size(shape["D"])
    forward = Tile(64 if dtype.itemsize == 2 else 32, 4 if shape["K"] <= 32 else 8)
    backward = Tile(32 if shape["K"] <= 32 else 16, 4)  # 64 tokens spilled at 32 with 4, 8 and 16 warps
    return Config(*(Tile(min(tile.block_d, widest), tile.num_warps) for tile in (forward, backward)))


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    tiles = [Tile(*knobs) for knobs in product((16, 32, 64, 128), (1, 2, 4, 8))]
    found = [start, *(Config(tile, start.backward) for tile in tiles), *(Config(start.forward, tile) for tile in tiles)]
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, and their tiles probably fit in registers: 16 elements a thread rarely spill."""
    return all(
        tile.num_warps in (1, 2, 4, 8)
        and 16 <= tile.block_d <= dot_size(shape["D"])
        and tile.block_d & (tile.block_d - 1) == 0
        and dot_size(shape["K"]) * tile.block_d <= 16 * 32 * tile.num_warps
        for tile in (config.forward, config.backward)
    )
