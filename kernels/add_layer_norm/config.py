"""Launch knobs of add_layer_norm's Triton kernels. R rows, D width."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import power_of_two

# Elements of a row that a thread holds, of several tensors each: with these nothing spills on sm_80, sm_90 or sm_100
# and about half of the warps of a multiprocessor are resident. The backward has more tensors, and its sums over rows.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32, 8
# Of the backward on one multiprocessor, by its 64 to 72 registers a thread. A program keeps its sums through all of its
# rows, so that more programs than run at once would only write more of them.
RESIDENT_WARPS = 28
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # of an A100, an H100 and a B200


@dataclass(frozen=True)
class Tile:
    """Rows that a program takes at a time, and its threads."""

    block_r: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    """`programs`: of the backward, among which the rows are divided."""

    forward: Tile
    backward: Tile
    programs: int


def padded_width(D: int) -> int:
    """The power of two that holds a row."""
    return power_of_two(D)


def _tile(width: int, elements: int) -> Tile:
    """4 warps for as many rows as give each thread its elements, more warps for a wider row."""
    return Tile(max(1, min(16, elements * 128 // width)), max(4, min(16, width // (32 * elements))))


def _multiprocessors(device: torch.device | str) -> int:
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS.get(str(device), MULTIPROCESSORS["sm_90"])


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """`dtype` makes no difference: registers hold fp32, and there is no shared memory to speak of."""
    width = padded_width(shape["D"])
    backward = _tile(width, BACKWARD_ELEMENTS)
    programs = _multiprocessors(device) * -(-RESIDENT_WARPS // backward.num_warps)
    return Config(_tile(width, FORWARD_ELEMENTS), backward, programs)


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    tiles = [Tile(*knobs) for knobs in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))]
    found = [start, *(Config(tile, start.backward, start.programs) for tile in tiles)]
    found += [Config(start.forward, tile, scale * start.programs // 2) for tile, scale in product(tiles, (1, 2, 4, 8))]
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, and their tiles probably fit in registers (any width does with 16 warps a row)."""
    width = padded_width(shape["D"])
    return config.programs >= 1 and all(
        tile.block_r >= 1
        and tile.block_r & (tile.block_r - 1) == 0
        and tile.num_warps in (1, 2, 4, 8, 16)
        and (tile.block_r * width <= 2 * elements * 32 * tile.num_warps or tile == Tile(1, 16))
        for tile, elements in ((config.forward, FORWARD_ELEMENTS), (config.backward, BACKWARD_ELEMENTS))
    )
