"""Launch knobs of sinkhorn's Triton kernels. R rows, C columns.

Registers and spills: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import power_of_two

# Of a whole row, what a thread holds while sums of columns gather beside it: twice 32 registers of its 128.
WHOLE_ELEMENTS = 32
# The widest row that one program holds so, with 16 warps and all registers of a multiprocessor. A wider one is read
# twice a round: for its own sum, and for those of the columns.
WIDEST_WHOLE = 16 * 32 * WHOLE_ELEMENTS
SLICE_COLUMNS = 2048  # of a row that is not held: 8 elements a thread of 8 warps, 16 take 118 registers with statistics
COLUMN_ELEMENTS = 32  # that a thread of the column pass loads at a time: a tile twice as large takes 96 registers
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # of an A100, an H100 and a B200
RESIDENT_WARPS = {"whole": 16, "columns": 32}  # on one multiprocessor: by registers, and by its limit of 32 programs
# Rows of a column program at least: its sums, written once for them, are then 2/64 of what it reads in fp32.
PART_ROWS = 64


@dataclass(frozen=True)
class Columns:
    """Tile of the column pass; the rows are divided among `parts` programs."""

    block_r: int
    block_c: int
    num_warps: int
    parts: int


@dataclass(frozen=True)
class Whole:
    """A row in the registers of a program; the rows are divided among `programs`."""

    block_c: int
    num_warps: int
    programs: int


@dataclass(frozen=True)
class Slices:
    """A row slice by slice, a program each."""

    block_c: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    """`whole` is None where the columns are summed in a pass of their own."""

    columns: Columns
    whole: Whole | None
    slices: Slices


def _multiprocessors(device: torch.device | str) -> int:
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS.get(str(device), MULTIPROCESSORS["sm_90"])


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """One warp a column program: it adds up rows within a thread, each of whose loads has 16 bytes."""
    R, C, multiprocessors = shape["R"], shape["C"], _multiprocessors(device)
    vector = 16 // dtype.itemsize
    enough = RESIDENT_WARPS["columns"] * multiprocessors // -(-C // (32 * vector))
    parts = max(1, min(-(-R // PART_ROWS), enough))
    whole, width = None, power_of_two(C)
    if C <= WIDEST_WHOLE:
        num_warps = max(1, width // (32 * WHOLE_ELEMENTS))
        whole = Whole(width, num_warps, multiprocessors * RESIDENT_WARPS["whole"] // num_warps)
    slice_columns = min(SLICE_COLUMNS, width)
    slices = Slices(slice_columns, max(1, slice_columns // 256))
    return Config(Columns(COLUMN_ELEMENTS // vector, 32 * vector, 1, parts), whole, slices)


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of one pass alone: their times do not interact."""
    start = heuristic(shape, dtype, "cuda")
    found = [start, replace(start, whole=None)]
    for block_r, block_c, num_warps, twice_parts in product((4, 8, 16, 32), (64, 128, 256, 512), (1, 2, 4), (1, 2, 4)):
        columns = Columns(block_r, block_c, num_warps, max(1, start.columns.parts * twice_parts // 2))
        found.append(replace(start, columns=columns))
    if start.whole is not None:
        for num_warps, twice_programs in product((1, 2, 4, 8, 16, 32), (1, 2, 4)):
            whole = Whole(start.whole.block_c, num_warps, max(1, start.whole.programs * twice_programs // 2))
            found.append(replace(start, whole=whole))
    for block_c, num_warps in product((512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16)):
        found.append(replace(start, slices=Slices(block_c, num_warps)))
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, and their tiles probably fit in registers."""
    columns, whole, slices = config.columns, config.whole, config.slices
    tiles = [(columns.block_r * columns.block_c, columns.num_warps, 2), (slices.block_c, slices.num_warps, 1)]
    if whole is not None:
        if whole.block_c < shape["C"] or whole.programs < 1:
            return False
        tiles.append((whole.block_c, whole.num_warps, 1))
    return columns.parts >= 1 and all(
        size >= 1
        and size & (size - 1) == 0
        and num_warps in (1, 2, 4, 8, 16, 32)
        and size <= much * WHOLE_ELEMENTS * 32 * num_warps
        for size, num_warps, much in tiles
    )
