"""Launch knobs of prototype_cross_entropy's Triton kernels. R predictions, C prototypes, E prototype width.

Registers and spills: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import SHARED_BYTES, dot_size

# Programs of a pass: two for each of an H100's 132 multiprocessors, so that none waits for the last one.
ENOUGH_PROGRAMS = 256


@dataclass(frozen=True)
class Tile:
    """Predictions and prototypes that one step of a program multiplies, and its threads and pipeline stages.

    Products are taken over slices of `slice_e` of their width. A program of a backward sums `block_out` columns of the
    gradient; where that is less than E, several programs multiply the same logits.
    """

    block_r: int
    block_c: int
    slice_e: int
    block_out: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """A tile for each kernel, and among how many programs it divides the dimension that it sums over."""

    forward: Tile
    features: Tile
    prototypes: Tile
    forward_splits: int
    features_splits: int
    prototypes_splits: int


def _splits(kept: int, block: int, summed: int, step: int) -> int:
    """As few as fill the device: every further one writes sums of its own.

    R=16,384 has 256 programs of 64 predictions unsplit; R=1,024 has 16 and takes 16 splits of C.
    """
    return max(1, min(-(-summed // step), -(-ENOUGH_PROGRAMS // -(-kept // block))))


def _with_splits(forward: Tile, features: Tile, prototypes: Tile, shape: Mapping[str, int]) -> Config:
    R, C = shape["R"], shape["C"]
    return Config(
        forward,
        features,
        prototypes,
        _splits(R, forward.block_r, C, forward.block_c),
        _splits(R, features.block_r, C, features.block_c),
        _splits(C, prototypes.block_c, R, prototypes.block_r),
    )


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """The largest tiles without spills on any of the three architectures; `device` makes no difference.

    The whole width E of the kept side stays in shared memory, and in the backwards also in registers as the sum; 64
    rows are what Hopper's tensor cores take at least. Targets whose logits are multiplied again (D is their width) need
    room for two more matrices, and `dtype` is the widest of all four. fp32 is multiplied as three tf32 products, whose
    parts leave room for slices alone.
    """
    width, again = dot_size(max(shape["E"], shape.get("D", 0))), "D" in shape
    most = dot_size(shape["E"])  # columns of the gradient
    if dtype.itemsize == 4:
        slice_e = min(32, width)
        forward = features = Tile(64, 32, slice_e, min(64, most), 8, 1)
        prototypes = Tile(32, 32 if again else 64, slice_e, min(64, most), 8, 1)
    elif width > 256:
        forward = Tile(64, 32, 64, most, 8, 1) if again else Tile(64, 32, width, most, 8, 2)
        features = Tile(64, 32, 64, min(256, most), 8, 1)
        prototypes = Tile(32, 64, 64, min(256, most), 8, 1)
    elif again:
        forward = Tile(64, 32, width, most, 8, 2)
        features = Tile(64, 32, width, most, 4, 2)
        prototypes = Tile(32, 64, width, most, 8, 2)
    else:
        forward = Tile(128, 64, width, most, 8, 2)
        features = Tile(64, 32, width, most, 4, 3)
        prototypes = Tile(32, 128, width, most, 8, 2)
    return _with_splits(forward, features, prototypes, shape)


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of one kernel alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    tiles = {"forward": start.forward, "features": start.features, "prototypes": start.prototypes}
    found = [start]
    for (name, tile), rows, columns, warps, stages in product(
        tiles.items(), (64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
    ):
        if name == "prototypes":
            rows, columns = columns, rows
        changed = replace(tile, block_r=rows, block_c=columns, num_warps=warps, num_stages=stages)
        found.append(_with_splits(**tiles | {name: changed}, shape=shape))
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, fit in shared memory, and probably in registers."""
    matrices, width = 2 if "D" in shape else 1, dot_size(shape["E"])
    for name in ("forward", "features", "prototypes"):
        tile: Tile = getattr(config, name)
        blocks = (tile.block_r, tile.block_c, tile.slice_e, tile.block_out)
        if any(block < 16 or block & (block - 1) for block in blocks):
            return False
        # what is multiplied whole is also summed whole
        if tile.block_out > width or (tile.slice_e >= width and tile.block_out < width):
            return False
        if tile.num_warps not in (4, 8) or getattr(config, f"{name}_splits") < 1:
            return False
        kept, moved = (tile.block_c, tile.block_r) if name == "prototypes" else (tile.block_r, tile.block_c)
        if matrices * (kept + tile.num_stages * moved) * tile.slice_e * dtype.itemsize > SHARED_BYTES:
            return False
        # elements a thread of the sum and of three tiles of logits
        held = (0 if name == "forward" else kept * tile.block_out) + 3 * tile.block_r * tile.block_c
        if held // (32 * tile.num_warps) > (192 if dtype.itemsize == 2 else 64):
            return False
    return True
