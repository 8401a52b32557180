"""sinkhorn in Triton: sums of exp(logits / temperature + row + column) over columns and rows. R rows, C columns.

Where a row fits in a program's registers, a round reads the logits once: a row's sum first, then the row, divided by
it, goes into the program's sums of columns for the next round. Sums are finished in a second kernel, in a fixed order.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.sinkhorn import reference
from stellar_fast.kernels.sinkhorn.config import Config
from stellar_fast.registry import Shape

SUM_EPS = tl.constexpr(reference.SUM_EPS)
# Below every logit, and finite, so that -inf less it is no NaN.
LOWEST = tl.constexpr(-1.0e30)
# In the entropy, for the logarithm of an assignment that is zero.
LOWEST_LOG = tl.constexpr(-100.0)

FINISH_PARTS, FINISH_COLUMNS = 16, 128  # tile of the finishing kernel, 16 elements a thread of 4 warps


@triton.jit
def _scores(logits_ptr, column_ptr, c, C, inverse_temperature, EVEN: tl.constexpr):
    """A slice of a row of logits / temperature + column; -inf beyond its end. EVEN: the row ends with a slice."""
    if EVEN:
        return tl.load(logits_ptr + c).to(tl.float32) * inverse_temperature + tl.load(column_ptr + c)
    logits = tl.load(logits_ptr + c, mask=c < C, other=float("-inf")).to(tl.float32)
    return logits * inverse_temperature + tl.load(column_ptr + c, mask=c < C, other=0.0)


@triton.jit(do_not_specialize=["R", "part_rows"])
def _columns_kernel(
    logits_ptr,
    row_ptr,  # None in the first round, as column
    column_ptr,
    peaks_ptr,  # (parts, C), None but in the first round
    sums_ptr,  # (parts, C)
    inverse_temperature,
    stride,
    R,
    C,
    part_rows,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    peak = tl.full((BLOCK_C,), LOWEST, tl.float32)  # of the logits themselves
    total = tl.zeros((BLOCK_C,), tl.float32)
    if row_ptr is not None:
        column = tl.load(column_ptr + c, mask=c_mask, other=0.0)
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, R)
    while first < last:
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & c_mask[None, :]
        tile = tl.load(logits_ptr + r[:, None] * stride + c[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        if row_ptr is None:
            higher = tl.maximum(peak, tl.max(tile, 0))
            total *= tl.exp((peak - higher) * inverse_temperature)
            total += tl.sum(tl.exp((tile - higher[None, :]) * inverse_temperature), 0)
            peak = higher
        else:
            row = tl.load(row_ptr + r, mask=r < last, other=0.0)
            total += tl.sum(tl.exp(tile * inverse_temperature + column[None, :] + row[:, None]), 0)
        first += BLOCK_R
    if row_ptr is None:
        tl.store(peaks_ptr + part * C + c, peak * inverse_temperature, mask=c_mask)
    tl.store(sums_ptr + part * C + c, total, mask=c_mask)


@triton.jit(do_not_specialize=["P"])
def _finish_kernel(
    peaks_ptr,  # (P, C), None but in the first round
    sums_ptr,  # (P, C)
    column_ptr,
    shift,
    scale,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The columns' potentials: written in the first round, changed in a later one."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    peak = tl.full((BLOCK_C,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    first = 0
    while first < P:
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (p < P)[:, None] & c_mask[None, :]
        sums = tl.load(sums_ptr + p[:, None] * C + c[None, :], mask=mask, other=0.0)
        if peaks_ptr is not None:
            peaks = tl.load(peaks_ptr + p[:, None] * C + c[None, :], mask=mask, other=LOWEST)
            higher = tl.maximum(peak, tl.max(peaks, 0))
            total *= tl.exp(peak - higher)
            sums *= tl.exp(peaks - higher[None, :])
            peak = higher
        total += tl.sum(sums, 0)
        first += BLOCK_P
    if peaks_ptr is not None:
        column = shift - peak - scale * tl.log(total)
    else:
        column = tl.load(column_ptr + c, mask=c_mask, other=0.0) - scale * tl.log(total + SUM_EPS)
    tl.store(column_ptr + c, column, mask=c_mask)


@triton.jit(do_not_specialize=["R"])
def _whole_rows_kernel(
    logits_ptr,
    column_ptr,
    row_ptr,
    sums_ptr,  # (programs, C), None in the last round
    out_ptr,  # None but in the last round
    inverse_temperature,
    stride,
    R,
    C,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    r = program
    while r < R:
        before = tl.load(row_ptr + r)
        t = tl.exp(_scores(logits_ptr + r * stride, column_ptr, c, C, inverse_temperature, EVEN) + before)
        divisor = tl.sum(t, 0) + SUM_EPS
        tl.store(row_ptr + r, before - tl.log(divisor))
        t *= 1.0 / divisor
        if sums_ptr is not None:
            sums += t
        if out_ptr is not None:
            tl.store(out_ptr + r * C + c, t, mask=c < C)
        r += programs
    if sums_ptr is not None:
        tl.store(sums_ptr + program * C + c, sums, mask=c < C)


@triton.jit
def _sliced_rows_kernel(
    logits_ptr,
    column_ptr,
    row_ptr,
    out_ptr,  # None, as entropy and first, where it is not asked for
    entropy_ptr,
    first_ptr,
    inverse_temperature,
    stride,
    C,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    logits, before = logits_ptr + r * stride, tl.load(row_ptr + r)
    slice_c = tl.arange(0, BLOCK_C)
    # summed over a slice only at the end: until then every element has its own
    totals = tl.zeros((BLOCK_C,), tl.float32)
    with_logs = tl.zeros((BLOCK_C,), tl.float32)
    best = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK_C,), tl.int32)
    start = 0
    while start < C:
        score = _scores(logits, column_ptr, start + slice_c, C, inverse_temperature, EVEN)
        t = tl.exp(score + before)
        totals += t
        if entropy_ptr is not None:
            with_logs += t * tl.maximum(score + before, LOWEST_LOG)
            better = score > best
            best, best_at = tl.where(better, score, best), tl.where(better, start + slice_c, best_at)
        start += BLOCK_C
    total = tl.sum(totals, 0)
    divisor = total + SUM_EPS
    log = tl.log(divisor)
    tl.store(row_ptr + r, before - log)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + r, (log * total - tl.sum(with_logs, 0)) / divisor)
        tl.store(first_ptr + r, tl.min(tl.where(best == tl.max(best, 0), best_at, 2147483647), 0))
    if out_ptr is not None:
        start = 0
        while start < C:
            c = start + slice_c
            t = tl.exp(_scores(logits, column_ptr, c, C, inverse_temperature, EVEN) + before)
            tl.store(out_ptr + r * C + c, t / divisor, mask=c < C)
            start += BLOCK_C


def _sum_columns(
    logits: Tensor, temperature: float, row: Tensor | None, column: Tensor | None, config: Config
) -> tuple[Tensor | None, Tensor]:
    """(peaks in the first round, sums), (parts, C) each."""
    (R, C), tile = logits.shape, config.columns
    part_rows = triton.cdiv(R, tile.parts)
    parts = triton.cdiv(R, part_rows)
    sums = logits.new_empty(parts, C, dtype=torch.float32)
    peaks = torch.empty_like(sums) if row is None else None
    launch(
        _columns_kernel,
        (triton.cdiv(C, tile.block_c), parts),
        logits,
        row,
        column,
        peaks,
        sums,
        1 / temperature,
        logits.stride(0),
        R,
        C,
        part_rows,
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
    )
    return peaks, sums


def launch_sinkhorn_columns(logits: Tensor, temperature: float, config: Config) -> tuple[Tensor, Tensor]:
    """Peaks of logits / temperature and sums of its exponentials below them, (parts, C) each."""
    peaks, sums = _sum_columns(logits, temperature, None, None, config)
    assert peaks is not None
    return peaks, sums


def launch_sinkhorn_rows(
    logits: Tensor,
    temperature: float,
    row: Tensor,
    column: Tensor,
    last: bool,
    out: Tensor,
    entropy: Tensor,
    first: Tensor,
    config: Config,
) -> Tensor:
    """Change `row`; return the sums (parts, C) of the columns, or in the last round none, and fill those of the results
    that are not empty. Rows of the logits may be strided, their elements not."""
    (R, C), whole = logits.shape, config.whole
    sums = logits.new_empty(0, C, dtype=torch.float32)
    out_or_none, entropy_or_none, first_or_none = (x if last and x.numel() else None for x in (out, entropy, first))
    if whole is not None and entropy_or_none is None and (out_or_none is not None or not last):
        programs = min(R, whole.programs)
        if not last:
            sums = logits.new_empty(programs, C, dtype=torch.float32)
        launch(
            _whole_rows_kernel,
            (programs,),
            logits,
            column,
            row,
            None if last else sums,
            out_or_none,
            1 / temperature,
            logits.stride(0),
            R,
            C,
            BLOCK_C=whole.block_c,
            EVEN=whole.block_c == C,
            num_warps=whole.num_warps,
        )
        return sums
    launch(
        _sliced_rows_kernel,
        (R,),
        logits,
        column,
        row,
        out_or_none,
        entropy_or_none,
        first_or_none,
        1 / temperature,
        logits.stride(0),
        C,
        BLOCK_C=config.slices.block_c,
        EVEN=C % config.slices.block_c == 0,
        num_warps=config.slices.num_warps,
    )
    return sums if last else _sum_columns(logits, temperature, row, column, config)[1]


def launch_sinkhorn_fwd(
    logits: Tensor,
    temperature: float,
    iterations: int,
    scale: float,
    assignments: bool,
    statistics: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (row, column, assignments, entropy, first), the last three of shape (0,) where not asked for."""
    R, C = logits.shape
    row, column = logits.new_zeros(R, dtype=torch.float32), logits.new_empty(C, dtype=torch.float32)
    out = logits.new_empty((R, C) if assignments else 0, dtype=torch.float32)
    entropy = logits.new_empty(R if statistics else 0, dtype=torch.float32)
    first = torch.empty_like(entropy, dtype=torch.int64)
    peaks: Tensor | None
    peaks, sums = launch_sinkhorn_columns(logits, temperature, config)
    for i in range(iterations):
        launch(
            _finish_kernel,
            (triton.cdiv(C, FINISH_COLUMNS),),
            peaks,
            sums,
            column,
            reference.PEAK * (1 - scale),
            scale,
            sums.shape[0],
            C,
            BLOCK_P=FINISH_PARTS,
            BLOCK_C=FINISH_COLUMNS,
            num_warps=4,
        )
        last = i == iterations - 1
        peaks, sums = None, launch_sinkhorn_rows(logits, temperature, row, column, last, out, entropy, first, config)
    return row, column, out, entropy, first


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: potentials with statistics and without, and assignments."""
    logits = torch.empty(shape["R"], shape["C"], dtype=dtype, device="meta")
    for assignments, statistics in ((False, False), (False, True), (True, False)):
        launch_sinkhorn_fwd(logits, 0.06, 3, 1.0, assignments, statistics, config)
    # of rows that are too wide to be held
    launch_sinkhorn_fwd(logits, 0.06, 3, 1.0, True, False, replace(config, whole=None))
