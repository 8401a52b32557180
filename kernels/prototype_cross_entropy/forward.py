"""The forward of prototype_cross_entropy on a GPU, and what both directions share. Letters as in kernel.py.

A program goes through its share of the prototypes with a running maximum and sums that belong to it; a second kernel
joins what the splits found.
"""

import triton
import triton.language as tl

from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.common.tl_loop import loop_end


@triton.jit
def load_rows(pointer, row, row_stride, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK of a matrix's rows, zero past its width and where a row is not valid."""
    column = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def product(
    left_ptr, left_row, left_stride, left_valid, right_ptr, right_row, right_stride, right_valid, SHAPE: tl.constexpr,
    WIDTH: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip
    """Rows of one matrix times those of another, in slices of their width: what fp32's three parts have room for."""
    out = tl.zeros(SHAPE, tl.float32)
    for first in range(0, WIDTH, SLICE):
        left = load_rows(left_ptr, left_row, left_stride, left_valid, first, WIDTH, SLICE)
        right = load_rows(right_ptr, right_row, right_stride, right_valid, first, WIDTH, SLICE)
        out = dot(left, tl.trans(right), out)
    return out


@triton.jit
def target_tile(row_potential, column_potential, scores, temperature, valid):
    # divided: a rounded reciprocal would shift all powers, which reach a hundred, the same way
    t = tl.exp(scores / temperature + column_potential + row_potential)
    return tl.where(valid, t, 0.0)


@triton.jit(do_not_specialize=["R"])
def forward_kernel(
    features_ptr,
    prototypes_ptr,
    index_ptr,  # None: prediction r learns target r
    classes_ptr,  # None where the targets are soft
    row_ptr,
    column_ptr,
    logits_ptr,  # None where they are multiplied again, from
    target_features_ptr,
    target_prototypes_ptr,
    parts_ptr,  # (4, splits, R): maximum, sum of exponentials, sum_c t_c (maximum - x_c), sum_c t_c
    features_stride,
    prototypes_stride,
    logits_stride,
    target_features_stride,
    target_prototypes_stride,
    factor,
    target_temperature,
    R,
    C,
    tiles,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    split, splits = tl.program_id(1), tl.num_programs(1)
    r_at = r.to(tl.int64)
    if SLICE >= E:
        features = load_rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
    target = r.to(tl.int64)
    if index_ptr is not None:
        target = tl.load(index_ptr + r, mask=r_mask, other=0)
    if classes_ptr is not None:
        chosen = tl.load(classes_ptr + target, mask=r_mask, other=-1)
    else:
        row = tl.load(row_ptr + target, mask=r_mask, other=float("-inf"))
        if logits_ptr is None and SLICE >= D:
            target_features = load_rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)

    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    below = tl.zeros((BLOCK_R,), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    for tile in range(loop_end(tiles)):
        c = (split * tiles + tile) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < C
        mask = r_mask[:, None] & c_mask[None, :]
        c_at = c.to(tl.int64)
        if SLICE >= E:
            prototypes = load_rows(prototypes_ptr, c_at, prototypes_stride, c_mask, 0, E, BLOCK_E)
            x = dot(features, tl.trans(prototypes)) * factor
        else:
            x = factor * product(
                features_ptr, r_at, features_stride, r_mask, prototypes_ptr, c_at, prototypes_stride, c_mask,
                (BLOCK_R, BLOCK_C), E, SLICE
            )  # fmt: skip
        x = tl.where(c_mask[None, :], x, float("-inf"))
        if classes_ptr is not None:
            t = (c[None, :] == chosen[:, None]).to(tl.float32)
        else:
            column = tl.load(column_ptr + c, mask=c_mask, other=0.0)
            if logits_ptr is not None:
                at = logits_ptr + target[:, None] * logits_stride + c[None, :]
                scores = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            elif SLICE >= D:
                target_prototypes = load_rows(
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, 0, D, BLOCK_D
                )
                scores = dot(target_features, tl.trans(target_prototypes))
            else:
                scores = product(
                    target_features_ptr, target, target_features_stride, r_mask,
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, (BLOCK_R, BLOCK_C), D, SLICE
                )  # fmt: skip
            t = target_tile(row[:, None], column[None, :], scores, target_temperature, mask)
        higher = tl.maximum(top, tl.max(x, 1))
        # a split that is past the end has seen nothing: its maximum stays -inf, and it adds nothing
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        below += tl.where(mass == 0.0, 0.0, mass * (anchor - top))
        below += tl.sum(tl.where(t == 0.0, 0.0, t * (anchor[:, None] - x)), 1)
        mass += tl.sum(t, 1)
        total = total * tl.exp(top - anchor) + tl.sum(tl.exp(x - anchor[:, None]), 1)
        top = higher
    at = split.to(tl.int64) * R + r
    step = splits.to(tl.int64) * R
    tl.store(parts_ptr + at, top, mask=r_mask)
    tl.store(parts_ptr + at + step, total, mask=r_mask)
    tl.store(parts_ptr + at + 2 * step, below, mask=r_mask)
    tl.store(parts_ptr + at + 3 * step, mass, mask=r_mask)


@triton.jit(do_not_specialize=["R"])
def combine_kernel(parts_ptr, loss_ptr, lse_ptr, mass_ptr, R, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr):
    """What the splits found, as one: loss, log-sum-exp and sum of the target of every prediction."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    step = SPLITS * R.to(tl.int64)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(parts_ptr + split * R + r, mask=r_mask, other=0.0))
    total = tl.zeros((BLOCK_R,), tl.float32)
    below = tl.zeros((BLOCK_R,), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(SPLITS):
        at = parts_ptr + split * R + r
        part_top = tl.load(at, mask=r_mask, other=0.0)
        part_mass = tl.load(at + 3 * step, mask=r_mask, other=0.0)
        total += tl.load(at + step, mask=r_mask, other=0.0) * tl.exp(part_top - top)
        below += tl.load(at + 2 * step, mask=r_mask, other=0.0)
        below += tl.where(part_mass == 0.0, 0.0, part_mass * (top - part_top))
        mass += part_mass
    tl.store(loss_ptr + r, below + mass * tl.log(total), mask=r_mask)
    tl.store(lse_ptr + r, top + tl.log(total), mask=r_mask)
    tl.store(mass_ptr + r, mass, mask=r_mask)
