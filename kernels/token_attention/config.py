"""Launch knobs of token_attention's Triton kernels.

Shape letters: Lq and Lk, the longest sequence of queries and of keys; d, the width of a head.

Registers here are those of ahead-of-time compiles (triton 3.6 and 3.9 for sm_80, sm_90 and sm_100; a thread has at most
255): no default spills at lengths of 53 and more. Traffic is counted, not measured: nothing was timed on a GPU yet.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.registry import Shape

# Of one batch; a training batch has three at the most. Lengths in no order would otherwise take a launch a sequence.
MOST_RUNS = 4


@dataclass(frozen=True)
class Tile:
    """Knobs of one kernel.

    Attributes:
        block_q: rows of queries at a time; in the tiled backward rows of the other side that a step takes.
        block_k: rows of keys at a time: all of a sequence's or, in the backward, else rows that a program owns.
        num_warps: of a program; four make the warpgroup that sm_90's tensor cores want.
        num_stages: depth of the pipeline of loads; 1 where there is no loop.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    forward: Tile
    backward: Tile


class Run(NamedTuple):
    """Sequences first to end - 1 of a batch, which one launch takes, and their longest."""

    first: int
    end: int
    longest_q: int
    longest_k: int
    config: Config


def heuristic(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Config:
    """Tiles for the longest sequences of a launch.

    Args:
        shape: with "Lq", "Lk" and "d".
        dtype: of the inputs.
        device: a torch device, or "sm_80" and the like; what is not known counts as sm_90.
    """
    queries, keys, wide = dot_size(shape["Lq"]), dot_size(shape["Lk"]), shape["d"] > 64
    if dtype == torch.float32:
        # three tf32 products hold three parts of every operand: 64-row tiles spill everywhere
        forward = Tile(min(queries, 16 if wide else 32), min(keys, 32), 4, 1)
        return Config(forward, Tile(16, min(keys, 16 if wide else 32), 8, 1))
    warpgroups = _has_warpgroups(device)

    # Few queries (1 or 17 in the last block) take a tile of 16 or 32, below the 64 rows of an HGMMA: there is little to
    # multiply, and these launches only read keys and values.
    if keys <= 128:  # one tile of keys, 230 registers at the most
        forward = Tile(min(queries, 64), keys, 8 if wide and keys == 128 else 4, 1)
    elif queries <= 64:
        forward = Tile(queries, 64, 8 if wide else 4, 2)
    else:
        # with tiles of 64 queries, keys and values of length 213 would come from the L2 cache 4 times, which takes
        # longer than the kernel's traffic with memory
        forward = Tile(128, 64, 8, 2)

    if keys <= 64:  # a whole sequence in one tile; more queries than that in steps, for which 64 rows are too many
        rows = queries if queries <= 64 else 32
        # 16 queries by 64 keys in 4 warps spill 3 registers on sm_100 (triton 3.9)
        many = (rows == 16 and keys == 64) or (wide and (queries > 64 or not warpgroups))
        backward = Tile(rows, keys, 8 if many else 4, 1)
    elif (keys == 128 and (warpgroups or not wide)) or (keys == 256 and warpgroups and not wide):
        # All keys of a sequence in one program: 5 products instead of 7, and every tensor read once. At 256 keys that
        # takes 255 registers, so no second program beside it; on sm_80 it would spill.
        backward = Tile(min(queries, 32), keys, 8, 1 if keys == 128 else 2)
    else:
        backward = Tile(min(queries, 32), 64 if wide else 128, 8, 2)
    return Config(forward, backward)


def _has_warpgroups(device: torch.device | str) -> bool:
    """Whether tensor cores read their operands from shared memory (sm_90, sm_100), which leaves registers free."""
    name = str(device)
    if name.startswith("sm_"):
        major = int(name.removeprefix("sm_")) // 10
    elif name.startswith("cuda"):
        major = torch.cuda.get_device_capability(device)[0]
    else:
        major = 9
    return 9 <= major < 12


def candidates(shape: Shape, dtype: torch.dtype) -> Iterator[Config]:
    """What a tuner tries: each tile of the forward with the default backward, then the other way round."""
    default = heuristic(shape, dtype, "sm_90")
    tiles = [
        Tile(*knobs) for knobs in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (2, 4, 8), (1, 2, 3))
    ]
    tried = [replace(default, forward=tile) for tile in tiles] + [replace(default, backward=tile) for tile in tiles]
    return (config for config in dict.fromkeys([default, *tried]) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether a config can run at a shape without tiles much larger than it, or accumulators past the registers."""
    width = dot_size(shape["d"])
    for tile, products in ((config.forward, 1), (config.backward, 2)):
        sizes = (tile.block_q, tile.block_k, tile.num_warps, tile.num_stages)
        if any(size < 1 or size & (size - 1) for size in sizes[:3]) or min(sizes[:2]) < 16 or not 1 <= sizes[3] <= 4:
            return False
        if tile.block_q > dot_size(shape["Lq"]) or tile.block_k > dot_size(shape["Lk"]):
            return False
        # fp32 numbers a thread: the accumulators of `products` gradients (or the output) and as many tiles of scores
        owned = tile.block_q if products == 1 else tile.block_k
        held = products * (owned * width + tile.block_q * tile.block_k) / (32 * tile.num_warps)
        if held > (48 if dtype == torch.float32 else 192):  # beyond it every kernel spilled
            return False
    return True


def runs(
    groups: Sequence[tuple[int, int, int]],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str,
    choose: Callable[[Shape, torch.dtype, torch.device | str], Config] = heuristic,
) -> list[Run]:
    """Split a mixed batch into launches: runs of neighbouring groups that take the same tiles.

    A launch pays for its longest sequence: in one for lengths 213, 56 and 53 the short ones would run through the
    longest's kernel, and almost every second program of the forward would start only to find nothing to do.

    Args:
        groups: (sequences, length of q, length of k) in packed order.
        shape: with "d", the width of a head.
        dtype: of the inputs.
        device: as for `heuristic`.
        choose: the knobs of one launch.
    """
    configs = {
        (Lq, Lk): choose({**shape, "Lq": Lq, "Lk": Lk}, dtype, device) for Lq, Lk in {group[1:] for group in groups}
    }
    found: list[Run] = []
    start = 0
    for count, Lq, Lk in groups:
        if count == 0:
            continue
        run = Run(start, start + count, Lq, Lk, configs[Lq, Lk])
        start = run.end
        if found and found[-1].config == run.config:
            last = found.pop()
            run = Run(last.first, run.end, max(last.longest_q, Lq), max(last.longest_k, Lk), run.config)
        found.append(run)
    if len(found) <= MOST_RUNS:
        return found
    Lq, Lk = max(run.longest_q for run in found), max(run.longest_k for run in found)
    return [Run(0, start, Lq, Lk, choose({**shape, "Lq": Lq, "Lk": Lk}, dtype, device))]
