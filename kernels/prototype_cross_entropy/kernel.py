"""prototype_cross_entropy in Triton: logits are tiles in registers, of a product that the backward takes again.

R predictions, T targets, C prototypes, E prototype width, D width of the targets' features. E and D are compiled in, R
is not. The forward goes through the prototypes with a running maximum and sums that belong to it. Each backward keeps
the sum that it is after in registers: a block of predictions goes through the prototypes, a block of prototypes through
the predictions. What is divided among programs (splits) is added afterwards, always in the same order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.prototype_cross_entropy.config import Config, Tile, heuristic
from stellar_fast.registry import Shape

# fp16 has no room for probabilities below 6e-5: its gradients of logits, at most about one, are taken this much larger.
FP16_SCALE = tl.constexpr(1024.0)
COMBINE_ROWS = 128


@triton.jit
def _rows(pointer, row, row_stride, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK of a matrix's rows, zero past its width and where a row is not valid."""
    column = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _product(
    left_ptr, left_row, left_stride, left_valid, right_ptr, right_row, right_stride, right_valid, SHAPE: tl.constexpr,
    WIDTH: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip
    """Rows of one matrix times those of another, in slices of their width: what fp32's three parts have room for."""
    out = tl.zeros(SHAPE, tl.float32)
    for first in range(0, WIDTH, SLICE):
        left = _rows(left_ptr, left_row, left_stride, left_valid, first, WIDTH, SLICE)
        right = _rows(right_ptr, right_row, right_stride, right_valid, first, WIDTH, SLICE)
        out = dot(left, tl.trans(right), out)
    return out


@triton.jit
def _target_tile(row_potential, column_potential, scores, temperature, valid):
    # divided: a rounded reciprocal would shift all powers, which reach a hundred, the same way
    t = tl.exp(scores / temperature + column_potential + row_potential)
    return tl.where(valid, t, 0.0)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
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
        features = _rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
    target = r.to(tl.int64)
    if index_ptr is not None:
        target = tl.load(index_ptr + r, mask=r_mask, other=0)
    if classes_ptr is not None:
        chosen = tl.load(classes_ptr + target, mask=r_mask, other=-1)
    else:
        row = tl.load(row_ptr + target, mask=r_mask, other=float("-inf"))
        if logits_ptr is None and SLICE >= D:
            target_features = _rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)

    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    below = tl.zeros((BLOCK_R,), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    for tile in range(tiles):
        c = (split * tiles + tile) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < C
        mask = r_mask[:, None] & c_mask[None, :]
        c_at = c.to(tl.int64)
        if SLICE >= E:
            prototypes = _rows(prototypes_ptr, c_at, prototypes_stride, c_mask, 0, E, BLOCK_E)
            x = dot(features, tl.trans(prototypes)) * factor
        else:
            x = factor * _product(
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
                target_prototypes = _rows(target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, 0, D, BLOCK_D)
                scores = dot(target_features, tl.trans(target_prototypes))
            else:
                scores = _product(
                    target_features_ptr, target, target_features_stride, r_mask,
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, (BLOCK_R, BLOCK_C), D, SLICE
                )  # fmt: skip
            t = _target_tile(row[:, None], column[None, :], scores, target_temperature, mask)
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
def _combine_kernel(parts_ptr, loss_ptr, lse_ptr, mass_ptr, R, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr):
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


@triton.jit
def _as_operand(x, like):
    """A gradient of logits in the dtype that it is multiplied in."""
    if like.dtype == tl.float16:
        return (x * FP16_SCALE).to(tl.float16)
    else:
        return x.to(like.dtype)


@triton.jit(do_not_specialize=["R"])
def _features_kernel(
    features_ptr,
    prototypes_ptr,
    index_ptr,
    classes_ptr,
    row_ptr,
    column_ptr,
    logits_ptr,
    target_features_ptr,
    target_prototypes_ptr,
    lse_ptr,
    mass_ptr,
    grad_ptr,  # of the loss, one element
    out_ptr,  # (splits, R, E)
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
    """sum_c (softmax_c mass - t_c) prototypes_c of a block of predictions."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    split = tl.program_id(1)
    e_first = tl.program_id(2) * BLOCK_OUT
    r_at = r.to(tl.int64)
    if SLICE >= E:
        features = _rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
    lse = tl.load(lse_ptr + r, mask=r_mask, other=0.0)
    mass = tl.load(mass_ptr + r, mask=r_mask, other=0.0)
    target = r.to(tl.int64)
    if index_ptr is not None:
        target = tl.load(index_ptr + r, mask=r_mask, other=0)
    if classes_ptr is not None:
        chosen = tl.load(classes_ptr + target, mask=r_mask, other=-1)
    else:
        row = tl.load(row_ptr + target, mask=r_mask, other=float("-inf"))
        if logits_ptr is None and SLICE >= D:
            target_features = _rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)
    out = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
    for tile in range(tiles):
        c = (split * tiles + tile) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < C
        mask = r_mask[:, None] & c_mask[None, :]
        c_at = c.to(tl.int64)
        if SLICE >= E:
            prototypes = _rows(prototypes_ptr, c_at, prototypes_stride, c_mask, 0, E, BLOCK_E)
            x = dot(features, tl.trans(prototypes)) * factor
        else:
            x = factor * _product(
                features_ptr, r_at, features_stride, r_mask, prototypes_ptr, c_at, prototypes_stride, c_mask,
                (BLOCK_R, BLOCK_C), E, SLICE
            )  # fmt: skip
            prototypes = _rows(prototypes_ptr, c_at, prototypes_stride, c_mask, e_first, E, BLOCK_OUT)
        if classes_ptr is not None:
            t = (c[None, :] == chosen[:, None]).to(tl.float32)
        else:
            column = tl.load(column_ptr + c, mask=c_mask, other=0.0)
            if logits_ptr is not None:
                at = logits_ptr + target[:, None] * logits_stride + c[None, :]
                scores = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            elif SLICE >= D:
                target_prototypes = _rows(target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, 0, D, BLOCK_D)
                scores = dot(target_features, tl.trans(target_prototypes))
            else:
                scores = _product(
                    target_features_ptr, target, target_features_stride, r_mask,
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, (BLOCK_R, BLOCK_C), D, SLICE
                )  # fmt: skip
            t = _target_tile(row[:, None], column[None, :], scores, target_temperature, mask)
        # past the last prototype the rows of prototypes are zero
        grad = tl.exp(tl.minimum(x - lse[:, None], 0.0)) * mass[:, None] - t
        out = dot(_as_operand(grad, prototypes), prototypes, out)
    e = e_first + tl.arange(0, BLOCK_OUT)
    scale = tl.load(grad_ptr).to(tl.float32) * factor / R
    if features_ptr.dtype.element_ty == tl.float16:
        scale /= FP16_SCALE
    out_ptr += split.to(tl.int64) * R * E
    at = r.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptr + at, out * scale, mask=r_mask[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["R"])
def _prototypes_kernel(
    features_ptr,
    prototypes_ptr,
    index_ptr,
    classes_ptr,
    row_ptr,
    column_ptr,
    logits_ptr,
    target_features_ptr,
    target_prototypes_ptr,
    lse_ptr,
    mass_ptr,
    grad_ptr,
    out_ptr,  # (splits, C, E)
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
    """sum_r (softmax_c mass - t_c) features_r of a block of prototypes; tiles are (prototypes, predictions)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    split = tl.program_id(1)
    e_first = tl.program_id(2) * BLOCK_OUT
    c_at = c.to(tl.int64)
    if SLICE >= E:
        prototypes = _rows(prototypes_ptr, c_at, prototypes_stride, c_mask, 0, E, BLOCK_E)
    if classes_ptr is None:
        column = tl.load(column_ptr + c, mask=c_mask, other=0.0)
        if logits_ptr is None and SLICE >= D:
            target_prototypes = _rows(target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, 0, D, BLOCK_D)
    out = tl.zeros((BLOCK_C, BLOCK_OUT), tl.float32)
    for tile in range(tiles):
        r = (split * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        r_mask = r < R
        mask = c_mask[:, None] & r_mask[None, :]
        r_at = r.to(tl.int64)
        lse = tl.load(lse_ptr + r, mask=r_mask, other=0.0)
        mass = tl.load(mass_ptr + r, mask=r_mask, other=0.0)
        target = r.to(tl.int64)
        if index_ptr is not None:
            target = tl.load(index_ptr + r, mask=r_mask, other=0)
        if SLICE >= E:
            features = _rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
            x = dot(prototypes, tl.trans(features)) * factor
        else:
            x = factor * _product(
                prototypes_ptr, c_at, prototypes_stride, c_mask, features_ptr, r_at, features_stride, r_mask,
                (BLOCK_C, BLOCK_R), E, SLICE
            )  # fmt: skip
            features = _rows(features_ptr, r_at, features_stride, r_mask, e_first, E, BLOCK_OUT)
        if classes_ptr is not None:
            chosen = tl.load(classes_ptr + target, mask=r_mask, other=-1)
            t = (c[:, None] == chosen[None, :]).to(tl.float32)
        else:
            row = tl.load(row_ptr + target, mask=r_mask, other=float("-inf"))
            if logits_ptr is not None:
                at = logits_ptr + target[None, :] * logits_stride + c[:, None]
                scores = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            elif SLICE >= D:
                target_features = _rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)
                scores = dot(target_prototypes, tl.trans(target_features))
            else:
                scores = _product(
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask,
                    target_features_ptr, target, target_features_stride, r_mask, (BLOCK_C, BLOCK_R), D, SLICE
                )  # fmt: skip
            t = _target_tile(row[None, :], column[:, None], scores, target_temperature, mask)
        # past the last prediction the mass and the rows of features are zero
        grad = tl.exp(tl.minimum(x - lse[None, :], 0.0)) * mass[None, :] - t
        out = dot(_as_operand(grad, features), features, out)
    e = e_first + tl.arange(0, BLOCK_OUT)
    scale = tl.load(grad_ptr).to(tl.float32) * factor / R
    if features_ptr.dtype.element_ty == tl.float16:
        scale /= FP16_SCALE
    out_ptr += split.to(tl.int64) * C * E
    at = c.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptr + at, out * scale, mask=c_mask[:, None] & (e < E)[None, :])


def _inputs(
    features: Tensor, prototypes: Tensor, targets: list[Tensor], index: Tensor | None
) -> tuple[list[Tensor | None], list[int]]:
    """The pointers and strides that all three kernels take, in order."""
    classes = row = column = logits = target_features = target_prototypes = None
    if len(targets) == 1:
        (classes,) = targets
    elif len(targets) == 3:
        row, column, logits = targets
    else:
        row, column, target_features, target_prototypes = targets
    pointers = [features, prototypes, index, classes, row, column, logits, target_features, target_prototypes]
    matrices = (features, prototypes, logits, target_features, target_prototypes)
    return pointers, [0 if x is None else x.stride(0) for x in matrices]


def _widths(features: Tensor, targets: list[Tensor], tile: Tile) -> dict[str, int]:
    E, D = features.shape[1], targets[2].shape[1] if len(targets) == 4 else 1
    blocks = {
        "BLOCK_E": dot_size(E),
        "BLOCK_D": dot_size(D),
        "SLICE": tile.slice_e,
        "BLOCK_OUT": tile.block_out,
    }
    return {"E": E, "D": D, **blocks}


def launch_prototype_cross_entropy_fwd(
    features: Tensor,
    prototypes: Tensor,
    targets: list[Tensor],
    target_temperature: float,
    index: Tensor | None,
    temperature: float,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, lse, mass): 0-dim, (R,) and (R,), fp32.

    `targets` are [classes], [row, column, logits] or [row, column, features, prototypes]; the elements of a row are
    next to each other in all matrices, vectors are contiguous. features and prototypes have one dtype.
    """
    (R, _), C, tile = features.shape, len(prototypes), config.forward
    tiles = triton.cdiv(triton.cdiv(C, tile.block_c), config.forward_splits)
    splits = triton.cdiv(triton.cdiv(C, tile.block_c), tiles)
    new = functools.partial(torch.empty, dtype=torch.float32, device=features.device)
    parts, losses, lse, mass = new(4, splits, R), new(R), new(R), new(R)
    pointers, strides = _inputs(features, prototypes, targets, index)
    launch(
        _forward_kernel,
        (triton.cdiv(R, tile.block_r), splits),
        *pointers,
        parts,
        *strides,
        1 / temperature,
        target_temperature,
        R,
        C,
        tiles,
        **_widths(features, targets, tile),
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch(
        _combine_kernel,
        (triton.cdiv(R, COMBINE_ROWS),),
        parts,
        losses,
        lse,
        mass,
        R,
        SPLITS=splits,
        BLOCK_R=COMBINE_ROWS,
        num_warps=4,
    )
    return losses.mean(), lse, mass


def launch_prototype_cross_entropy_bwd(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    targets: list[Tensor],
    target_temperature: float,
    index: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    temperature: float,
    needs: list[bool],
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Return (grad_features, grad_prototypes), fp32, of shape (0,) where `needs` does not ask for it."""
    (R, E), C = features.shape, len(prototypes)
    pointers, strides = _inputs(features, prototypes, targets, index)
    grads = []
    for kernel, tile, splits, kept, summed, needed in (
        (_features_kernel, config.features, config.features_splits, "r", "c", needs[0]),
        (_prototypes_kernel, config.prototypes, config.prototypes_splits, "c", "r", needs[1]),
    ):
        if not needed:
            grads.append(lse.new_empty(0))
            continue
        sizes, blocks = {"r": R, "c": C}, {"r": tile.block_r, "c": tile.block_c}
        steps = triton.cdiv(sizes[summed], blocks[summed])
        tiles = triton.cdiv(steps, splits)
        splits = triton.cdiv(steps, tiles)
        out = lse.new_empty(splits, sizes[kept], E)
        launch(
            kernel,
            (triton.cdiv(sizes[kept], blocks[kept]), splits, triton.cdiv(E, tile.block_out)),
            *pointers,
            lse,
            mass,
            grad,
            out,
            *strides,
            1 / temperature,
            target_temperature,
            R,
            C,
            tiles,
            **_widths(features, targets, tile),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        grads.append(out.sum(0) if splits > 1 else out[0])
    return grads[0], grads[1]


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: targets by logits, by features in each dtype, and as classes."""
    R, T, C, E = (shape[letter] for letter in "RTCE")

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    features, prototypes, index = new(R, E, dtype=dtype), new(C, E, dtype=dtype), new(R, dtype=torch.int64)
    cases = [([new(T), new(C), new(T, C)], config), ([new(T, dtype=torch.int64)], config)]
    for target_dtype in dict.fromkeys((dtype, torch.float32)):
        target_features, target_prototypes = new(T, E, dtype=target_dtype), new(C, E, dtype=target_dtype)
        again = heuristic({**shape, "D": E}, target_dtype, "cuda")
        cases.append(([new(T), new(C), target_features, target_prototypes], again))
    for targets, knobs in cases:
        _, lse, mass = launch_prototype_cross_entropy_fwd(features, prototypes, targets, 0.06, index, 0.12, knobs)
        launch_prototype_cross_entropy_bwd(
            new(), features, prototypes, targets, 0.06, index, lse, mass, 0.12, [True, True], knobs
        )
