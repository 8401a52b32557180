"""prototype_cross_entropy in Triton: logits are tiles in registers, of a product that the backward takes again.

R predictions, T targets, C prototypes, E prototype width, D width of the targets' features. E and D are compiled in, R
is not. What is divided among programs (splits) is added afterwards, always in the same order. The kernels are in
forward.py and backward.py.
"""

import functools

import torch
import triton
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tiles import dot_size
from stellar_fast.kernels.prototype_cross_entropy.backward import features_kernel, prototypes_kernel
from stellar_fast.kernels.prototype_cross_entropy.config import Config, Tile, heuristic
from stellar_fast.kernels.prototype_cross_entropy.forward import combine_kernel, forward_kernel
from stellar_fast.registry import Shape

COMBINE_ROWS = 128


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
    """Return (losses, lse, mass), (R,) fp32 each.

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
        forward_kernel,
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
        combine_kernel,
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
    return losses, lse, mass


def launch_prototype_cross_entropy_bwd(
    weights: Tensor,
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
    """Return (grad_features, grad_prototypes), fp32, of shape (0,) where `needs` does not ask for it.

    They are those of the sum of all predictions' losses, weighted by `weights` (R,), fp32.
    """
    # fp16 has room for gradients of logits of about one alone, whatever the losses are scaled by
    scale = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    relative = weights / scale
    (R, E), C = features.shape, len(prototypes)
    pointers, strides = _inputs(features, prototypes, targets, index)
    grads = []
    for kernel, more, tile, splits, kept, summed, needed in (
        (features_kernel, (), config.features, config.features_splits, "r", "c", needs[0]),
        (prototypes_kernel, (relative, scale), config.prototypes, config.prototypes_splits, "c", "r", needs[1]),
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
            *more,
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
    if needs[0]:
        grads[0].mul_(weights[:, None])
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
            new(R), features, prototypes, targets, 0.06, index, lse, mass, 0.12, [True, True], knobs
        )
