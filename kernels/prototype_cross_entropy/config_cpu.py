"""Knobs of prototype_cross_entropy's C++ and of the products around it. R predictions, C prototypes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from stellar_fast.kernels.common.threads import counts

# Logits of a block: more rows multiply faster, more bytes leave the third-level cache. With 2 cores of a Zen 5, R=1,024
# and C=16,384, 4 blocks of 256 rows took 70 ms in fp32, 8 of 128 rows 77.
BLOCK_BYTES = 16 * 2**20
BLOCK_ROWS = (128, 512)
MOST_BYTES = 64 * 2**20  # that a block may have at all: whole logits are what the operator is there to avoid


@dataclass(frozen=True)
class Config:
    """`block_rows`: predictions whose logits exist at a time, about: blocks are made alike. `threads`: of the C++."""

    block_rows: int
    threads: int


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """`dtype` is that of the products."""
    least, most = BLOCK_ROWS
    return Config(min(max(BLOCK_BYTES // (shape["C"] * dtype.itemsize), least), most), torch.get_num_threads())


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of one knob alone."""
    start = heuristic(shape, dtype, "cpu")
    found = [start, *(replace(start, block_rows=rows) for rows in (64, 96, 128, 192, 256, 384, 512, 768, 1024))]
    found += [replace(start, threads=count) for count in counts()]
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether torch may use as many threads now, and a block of logits is no larger than it should be."""
    small = config.block_rows * shape["C"] * dtype.itemsize <= MOST_BYTES or config.block_rows <= BLOCK_ROWS[0]
    return config.block_rows >= 1 and small and 1 <= config.threads <= torch.get_num_threads()
