"""The backward of prototype_cross_entropy on a GPU. Letters as in kernel.py.

Each kernel keeps the sum that it is after in registers: a block of predictions goes through the prototypes, a block of
prototypes through the predictions.
"""

import triton
import triton.language as tl

from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.common.tl_loop import loop_end
from stellar_fast.kernels.prototype_cross_entropy.forward import load_rows, product, target_tile

# fp16 has no room for probabilities below 6e-5: its gradients of logits, at most about one, are taken this much larger.
FP16_SCALE = tl.constexpr(1024.0)


@triton.jit
def _as_operand(x, like):
    """A gradient of logits in the dtype that it is multiplied in."""
    if like.dtype == tl.float16:
        return (x * FP16_SCALE).to(tl.float16)
    else:
        return x.to(like.dtype)


@triton.jit(do_not_specialize=["R"])
def features_kernel(
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
    """sum_c (softmax_c mass - t_c) prototypes_c / temperature of a block of predictions, for a weight of one."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    split = tl.program_id(1)
    e_first = tl.program_id(2) * BLOCK_OUT
    r_at = r.to(tl.int64)
    if SLICE >= E:
        features = load_rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
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
            target_features = load_rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)
    out = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
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
            prototypes = load_rows(prototypes_ptr, c_at, prototypes_stride, c_mask, e_first, E, BLOCK_OUT)
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
        # past the last prototype the rows of prototypes are zero
        grad = tl.exp(tl.minimum(x - lse[:, None], 0.0)) * mass[:, None] - t
        out = dot(_as_operand(grad, prototypes), prototypes, out)
    e = e_first + tl.arange(0, BLOCK_OUT)
    scale = factor
    if features_ptr.dtype.element_ty == tl.float16:
        scale /= FP16_SCALE
    out_ptr += split.to(tl.int64) * R * E
    at = r.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptr + at, out * scale, mask=r_mask[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["R"])
def prototypes_kernel(
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
    weights_ptr,  # (R,) of each prediction's loss, at most one
    scale_ptr,  # of them all, one element
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
    """sum_r weight_r (softmax_c mass - t_c) features_r of a block of prototypes; tiles are prototypes x predictions."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    split = tl.program_id(1)
    e_first = tl.program_id(2) * BLOCK_OUT
    c_at = c.to(tl.int64)
    if SLICE >= E:
        prototypes = load_rows(prototypes_ptr, c_at, prototypes_stride, c_mask, 0, E, BLOCK_E)
    if classes_ptr is None:
        column = tl.load(column_ptr + c, mask=c_mask, other=0.0)
        if logits_ptr is None and SLICE >= D:
            target_prototypes = load_rows(target_prototypes_ptr, c_at, target_prototypes_stride, c_mask, 0, D, BLOCK_D)
    out = tl.zeros((BLOCK_C, BLOCK_OUT), tl.float32)
    for tile in range(loop_end(tiles)):
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
            features = load_rows(features_ptr, r_at, features_stride, r_mask, 0, E, BLOCK_E)
            x = dot(prototypes, tl.trans(features)) * factor
        else:
            x = factor * product(
                prototypes_ptr, c_at, prototypes_stride, c_mask, features_ptr, r_at, features_stride, r_mask,
                (BLOCK_C, BLOCK_R), E, SLICE
            )  # fmt: skip
            features = load_rows(features_ptr, r_at, features_stride, r_mask, e_first, E, BLOCK_OUT)
        if classes_ptr is not None:
            chosen = tl.load(classes_ptr + target, mask=r_mask, other=-1)
            t = (c[:, None] == chosen[None, :]).to(tl.float32)
        else:
            row = tl.load(row_ptr + target, mask=r_mask, other=float("-inf"))
            if logits_ptr is not None:
                at = logits_ptr + target[None, :] * logits_stride + c[:, None]
                scores = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            elif SLICE >= D:
                target_features = load_rows(target_features_ptr, target, target_features_stride, r_mask, 0, D, BLOCK_D)
                scores = dot(target_prototypes, tl.trans(target_features))
            else:
                scores = product(
                    target_prototypes_ptr, c_at, target_prototypes_stride, c_mask,
                    target_features_ptr, target, target_features_stride, r_mask, (BLOCK_C, BLOCK_R), D, SLICE
                )  # fmt: skip
            t = target_tile(row[None, :], column[:, None], scores, target_temperature, mask)
        # past the last prediction the mass and the rows of features are zero
        weights = tl.load(weights_ptr + r, mask=r_mask, other=0.0)
        grad = (tl.exp(tl.minimum(x - lse[None, :], 0.0)) * mass[None, :] - t) * weights[None, :]
        out = dot(_as_operand(grad, features), features, out)
    e = e_first + tl.arange(0, BLOCK_OUT)
    scale = tl.load(scale_ptr) * factor
    if features_ptr.dtype.element_ty == tl.float16:
        scale /= FP16_SCALE
    out_ptr += split.to(tl.int64) * C * E
    at = c.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptr + at, out * scale, mask=c_mask[:, None] & (e < E)[None, :])
