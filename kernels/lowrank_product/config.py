"""Launch knobs of lowrank_product's Triton kernels. Letters as in kernel.py.

Registers and spills: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import SHARED_BYTES, dot_size

# Programs of a pass: two on each of an H100's 132 multiprocessors, so that one loads while the other multiplies.
ENOUGH_PROGRAMS = 256


@dataclass(frozen=True)
class Tile:
    """Patches, slice of D and slice of E that one step of a program takes, and its threads and pipeline stages."""

    block_p: int
    block_d: int
    block_e: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """`splits`: programs among which the backward divides an image's patches, each with its own sums to be added."""

    forward: Tile
    backward: Tile
    splits: int


def _splits(shape: Mapping[str, int], tile: Tile) -> int:
    """As few as fill the device: every further one writes and reads its own fp32 (K, D + E) again.

    B=128, P=196 has 512 programs unsplit (E=512 in slices of 128); B=8, P=1024 has 32 and takes 8 splits.
    """
    programs = shape["B"] * -(-shape["E"] // tile.block_e)
    return max(1, min(-(-shape["P"] // tile.block_p), -(-ENOUGH_PROGRAMS // max(1, programs))))


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """The largest tiles without spills on any of the three architectures; `device` makes no difference.

    64 patches are what Hopper's tensor cores take at least. Two to four such programs share a multiprocessor, so that
    the loads of one overlap with the products and stores of another. More than 16 tokens take more registers for the
    logits, hence more warps or smaller tiles; models have 8, 16 or 24. fp16 counts as fp32: beside fp32 gradients it is
    widened, and the three parts of an fp32 product take room.
    """
    K = shape["K"]
    if dtype == torch.bfloat16:
        forward = Tile(64, 128, 64, 8, 4)
        backward = Tile(64, 64, 128, 4 if K <= 16 else 8, 4) if K <= 32 else Tile(32, 32, 64, 4, 2)
    elif K <= 16:
        forward, backward = Tile(64, 64, 64, 8, 3), Tile(64, 64, 64, 4, 1)
    else:
        forward, backward = Tile(32, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2)
    forward, backward = _fitted(forward, shape), _fitted(backward, shape)
    return Config(forward, backward, _splits(shape, backward))


def _fitted(tile: Tile, shape: Mapping[str, int]) -> Tile:
    """No slice wider than the tensor, padded."""
    block_d, block_e = min(tile.block_d, dot_size(shape["D"])), min(tile.block_e, dot_size(shape["E"]))
    return replace(tile, block_d=block_d, block_e=block_e)


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    found = [start]
    for tile in product((64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        found.append(replace(start, forward=_fitted(Tile(*tile), shape)))
    for *knobs, splits in product((64,), (64, 128), (64, 128), (4, 8), (2, 4), (1, 2, 4, 8)):
        found.append(replace(start, backward=_fitted(Tile(*knobs), shape), splits=splits))
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, fit in shared memory, and probably in registers."""
    if not 1 <= config.splits <= max(1, -(-shape["P"] // config.backward.block_p)):
        return False
    block_k = dot_size(shape["K"])
    for tile in (config.forward, config.backward):
        blocks = (tile.block_p, tile.block_d, tile.block_e)
        if any(block < 16 or block & (block - 1) for block in blocks) or tile.num_warps not in (4, 8):
            return False
        loads = tile.num_stages * (tile.block_p + block_k) * tile.block_d * dtype.itemsize
        widest = tile.block_p * max(tile.block_d, tile.block_e)
        if loads + 4 * widest > SHARED_BYTES:  # tiles in flight, and one fp32 tile that changes its layout
            return False
        # of the widest fp32 tile, as many elements a thread as did not spill: products of fp32 hold three parts of each
        limit = 64 if dtype == torch.bfloat16 else 32
        if widest // (32 * tile.num_warps) * max(1, block_k // 32) > limit:
            return False
    return True
