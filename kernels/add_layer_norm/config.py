"""Launch knobs of add_layer_norm's Triton kernels. R rows, D width."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch

# Programs of the backward: four on each of an H100's 132 multiprocessors, that many fit by their registers.
ENOUGH_PROGRAMS = 512
MOST_ELEMENTS = 64  # of a tile a thread, as fp32 in registers: the backward holds five such tiles


@dataclass(frozen=True)
class Tile:
    block_r: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    """`steps`: tiles that a program of the backward goes through before it writes its sums for weight and bias."""

    forward: Tile
    backward: Tile
    steps: int


def padded_width(D: int) -> int:
    """The power of two that holds a row."""
    return 1 << (D - 1).bit_length()


def _steps(R: int, block_r: int) -> int:
    """Up to 16, while enough programs are left: the sums then cost 2 / 64 of a row's traffic or less."""
    steps = 16
    while steps > 1 and R < ENOUGH_PROGRAMS * steps * block_r:
        steps //= 2
    return steps


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """A row a warp up to 1,024 wide, so that its sums need no barrier; then as many warps as keep it in registers.

    Neither `dtype` nor `device` makes a difference: registers hold fp32, and there is no shared memory to speak of.
    """
    width = padded_width(shape["D"])
    tile = Tile(4, 4) if width <= 1024 else Tile(1, max(4, min(16, width // 1024)))
    return Config(tile, tile, _steps(shape["R"], tile.block_r))


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    tiles = [Tile(*knobs) for knobs in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))]
    found = [start, *(Config(tile, start.backward, start.steps) for tile in tiles)]
    found += [Config(start.forward, tile, steps) for tile, steps in product(tiles, (1, 4, 16, 64))]
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, and their tiles fit in registers."""
    width = padded_width(shape["D"])
    return config.steps >= 1 and all(
        tile.block_r >= 1
        and tile.block_r & (tile.block_r - 1) == 0
        and tile.num_warps in (1, 2, 4, 8, 16)
        and (tile.block_r * width <= MOST_ELEMENTS * 32 * tile.num_warps or tile == Tile(1, 16))
        for tile in (config.forward, config.backward)
    )
