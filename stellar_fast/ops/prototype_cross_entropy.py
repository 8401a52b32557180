"""prototype_cross_entropy: soft-target cross-entropy over prototypes, without their logits.

R predictions, T targets, C prototypes, E prototype width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.prototype_cross_entropy import config_cpu, reference
from stellar_fast.ops.checks import (
    autocast_dtype,
    check_floating,
    check_positive,
    check_shapes,
    in_forward_mode,
    surely,
    values_are_checked,
    with_dense_rows,
)
from stellar_fast.ops.linear import pointwise, transposed
from stellar_fast.ops.sinkhorn import SinkhornTargets
from stellar_fast.tune.lookup import knobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 512  # E that the Triton kernels hold in one tile
_OPERATOR = "prototype_cross_entropy"


# `targets` are [classes], [row, column, logits] or [row, column, features, prototypes]; products are taken in `dtype`.
# Returns (loss, lse, mass, grad_features, grad_prototypes^T). Triton keeps each prediction's log-sum-exp and its
# target's sum, (R,), and multiplies again in the backward. On a CPU a block of logits stays in the cache until it has
# become its gradient, which saves that product: there (R, E) and (E, C) fp32 are kept, as far as `needs` asks. Of few
# rows, whose (E, C) would be larger than the logits saved, the door asks for nothing and the backward multiplies again.
# What is not kept has shape (0,).
@torch.library.custom_op("stellar_fast::prototype_cross_entropy", mutates_args=())
def _forward(
    features: Tensor,
    prototypes: Tensor,
    targets: list[Tensor],
    target_temperature: float,
    index: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
    split_sizes: list[int],
    needs: list[bool],
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.prototype_cross_entropy import config, kernel

        features, prototypes, targets = _for_triton(features, prototypes, targets, dtype)
        chosen = knobs(_OPERATOR, config, *_problem(features, prototypes, targets), features.device)
        losses, lse, mass = kernel.launch_prototype_cross_entropy_fwd(
            features, prototypes, targets, target_temperature, index, temperature, chosen
        )
        return reference.means(losses, split_sizes), lse, mass, lse.new_empty(0), lse.new_empty(0)
    with torch.autocast("cpu", enabled=False):  # products are in the dtype of what they are given
        weights = _row_weights(torch.ones(len(split_sizes)), split_sizes)
        losses, grad_features, grad_prototypes_t = _on_cpu(
            features, prototypes, targets, target_temperature, index, temperature, dtype, weights, needs
        )
    losses = reference.means(losses, split_sizes).float()
    return losses, losses.new_empty(0), losses.new_empty(0), grad_features, grad_prototypes_t


@_forward.register_fake
def _(features, prototypes, targets, target_temperature, index, temperature, dtype, split_sizes, needs, name):
    (R, E), C = features.shape, prototypes.shape[0]
    rows = R if name == "triton" else 0
    sizes = [(len(split_sizes),), (rows,), (rows,)] + [
        size if name == "cpu" and need else (0,) for size, need in zip([(R, E), (E, C)], needs, strict=True)
    ]
    return tuple(features.new_empty(size, dtype=torch.float32) for size in sizes)


# (grad_features, grad_prototypes), each of shape (0,) if `needs` does not ask. The gradients that a CPU's forward kept
# serve where those of all losses are equal.
@torch.library.custom_op("stellar_fast::prototype_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    targets: list[Tensor],
    target_temperature: float,
    index: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    grad_features: Tensor,
    grad_prototypes_t: Tensor,
    temperature: float,
    dtype: torch.dtype,
    split_sizes: list[int],
    needs: list[bool],
    name: str,
) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "cpu":
        kept = [x.dim() == 2 for x in (grad_features, grad_prototypes_t)]
        if kept != needs or (grad != grad[0]).any():
            weights, grad = _row_weights(grad, split_sizes), torch.ones(1)
            with torch.autocast("cpu", enabled=False):
                _, grad_features, grad_prototypes_t = _on_cpu(
                    features, prototypes, targets, target_temperature, index, temperature, dtype, weights, needs
                )
        return _scaled(grad[0], grad_features, grad_prototypes_t, features.dtype, prototypes.dtype)
    from stellar_fast.kernels.prototype_cross_entropy import config, kernel

    dtypes = features.dtype, prototypes.dtype
    features, prototypes, targets = _for_triton(features, prototypes, targets, dtype)
    chosen = knobs(_OPERATOR, config, *_problem(features, prototypes, targets), features.device)
    grads = kernel.launch_prototype_cross_entropy_bwd(
        _row_weights(grad, split_sizes),
        features,
        prototypes,
        targets,
        target_temperature,
        index,
        lse,
        mass,
        temperature,
        needs,
        chosen,
    )
    return grads[0].to(dtypes[0]), grads[1].to(dtypes[1])


@_backward.register_fake
def _(
    grad,
    features,
    prototypes,
    targets,
    target_temperature,
    index,
    lse,
    mass,
    grad_features,
    grad_prototypes_t,
    temperature,
    dtype,
    split_sizes,
    needs,
    name,
):
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((features, prototypes), needs, strict=True))


# A CPU's backward of one loss: its forward's gradients times the loss's, in the dtypes of features and prototypes.
@torch.library.custom_op("stellar_fast::prototype_cross_entropy_scale_backward", mutates_args=())
def _scale_backward(
    grad: Tensor,
    grad_features: Tensor,
    grad_prototypes_t: Tensor,
    features_dtype: torch.dtype,
    prototypes_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, "cpu")
    return _scaled(grad[0], grad_features, grad_prototypes_t, features_dtype, prototypes_dtype)


@_scale_backward.register_fake
def _(grad, grad_features, grad_prototypes_t, features_dtype, prototypes_dtype):
    shape = grad_prototypes_t.shape[::-1]
    return torch.empty_like(grad_features, dtype=features_dtype), grad_features.new_empty(shape, dtype=prototypes_dtype)


def _scaled(
    grad: Tensor,
    grad_features: Tensor,
    grad_prototypes_t: Tensor,
    features_dtype: torch.dtype,
    prototypes_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if grad_prototypes_t.dim() == 2:
        grad_prototypes = transposed(grad_prototypes_t, None)
        if grad.item() != 1.0:  # of a loss that is added as it is, it is 1
            grad_prototypes.mul_(grad)
    else:
        grad_prototypes = grad_prototypes_t.clone()
    return (grad_features * grad).to(features_dtype), grad_prototypes.to(prototypes_dtype)


def _save(ctx, inputs, output) -> None:
    features, prototypes, targets, *scalars, kept_needs, ctx.name = inputs
    ctx.target_temperature, index, ctx.temperature, ctx.dtype, ctx.split_sizes = scalars
    _, *kept = output
    ctx.num_targets = len(targets)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.only_scales = ctx.name == "cpu" and any(kept_needs) and len(ctx.split_sizes) == 1
    if ctx.only_scales:
        ctx.dtypes = features.dtype, prototypes.dtype
        ctx.save_for_backward(*kept[2:])
    else:
        ctx.save_for_backward(features, prototypes, index, *kept, *targets)


def _differentiate(ctx, grad: Tensor | None, *_):
    needs = list(ctx.needs_input_grad[:2])
    grads: tuple[Tensor | None, ...] = (None, None)
    if grad is not None and ctx.only_scales:
        grads = _scale_backward(grad, *ctx.saved_tensors, *ctx.dtypes)
    elif grad is not None:
        features, prototypes, index, *kept = ctx.saved_tensors
        kept, targets = kept[:4], kept[4:]
        grads = _backward(
            grad,
            features,
            prototypes,
            targets,
            ctx.target_temperature,
            index,
            *kept,
            ctx.temperature,
            ctx.dtype,
            ctx.split_sizes,
            needs,
            ctx.name,
        )
    targets_and_rest = [None] * ctx.num_targets, *(None,) * 7
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *targets_and_rest


_forward.register_autograd(_differentiate, setup_context=_save)


def _on_cpu(
    features: Tensor,
    prototypes: Tensor,
    targets: list[Tensor],
    target_temperature: float,
    index: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
    weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, fp64, and as far as needed the gradients of features and, transposed, of prototypes.

    The gradients are those of the losses' sum weighted by `weights`, (R,) fp32.
    """
    (R, E), C = features.shape, prototypes.shape[0]
    # again, since a compiled call comes here unchecked and the native module reads where index and classes point
    _check_values(targets, index, C)
    if dtype != torch.bfloat16 or not _multiplies_bf16():
        dtype = torch.float32
    features, prototypes = features.to(dtype).contiguous(), prototypes.to(dtype).contiguous()
    if len(targets) > 1:
        targets = [x if x.dtype in (torch.float32, torch.bfloat16) else x.float() for x in targets]
        targets = [*(x.float().contiguous() for x in targets[:2]), *map(with_dense_rows, targets[2:])]
    needs_features, needs_prototypes = needs
    losses = torch.empty(R, dtype=torch.float64)
    grad_features = torch.empty((R, E) if needs_features else 0, dtype=torch.float32)
    grad_prototypes_t = torch.empty(0, dtype=torch.float32)
    # oneDNN's fp32 product with a transposed copy is a tenth faster than with a view
    across = prototypes.t()
    if needs_features and dtype == torch.float32:
        across = transposed(prototypes, "right")
    chosen = knobs(_OPERATOR, config_cpu, {"R": R, "C": C, "E": E}, dtype, features.device)
    rows = -(-R // max(1, round(R / chosen.block_rows)))  # blocks alike: a small last one multiplies at a lower rate
    for start in range(0, R, rows):
        block = features[start : start + rows]
        logits = _product(block, prototypes)
        kept, argument = _block_targets(targets, target_temperature, index, start, start + len(block))
        native.module().prototype_cross_entropy_rows(
            *logits.shape,
            logits.data_ptr(),
            dtype == torch.bfloat16,
            argument,
            temperature,
            weights[start:].data_ptr() if any(needs) else 0,
            losses[start:].data_ptr(),
            chosen.threads,
        )
        if needs_features:
            grad_features[start : start + rows] = _product(logits, across)
        if needs_prototypes:
            part = _product(block.t(), logits.t())
            grad_prototypes_t = grad_prototypes_t.add_(part) if start else part.float()
            del part
        del logits, kept  # or the next block's would stand beside them
    return losses, grad_features, grad_prototypes_t


def _row_weights(grad: Tensor, split_sizes: list[int]) -> Tensor:
    """What each row's loss counts where the runs' means have these gradients, (R,) fp32."""
    return torch.cat([g.expand(size) / size for g, size in zip(grad.float().unbind(), split_sizes, strict=True)])


def _block_targets(
    targets: list[Tensor], temperature: float, index: Tensor | None, start: int, stop: int
) -> tuple[list[Tensor | None], tuple]:
    """What rows [start, stop) learn, for the native module, and the tensors that have to live as long."""
    index = None if index is None else index[start:stop]
    if len(targets) == 1:
        classes = targets[0] if index is not None else targets[0][start:stop]
        classes = classes.contiguous()
        return [classes, index], (0, False, 0, 0, 0, 1.0, classes.data_ptr(), _address(index))
    row, column, *source = targets
    if len(source) == 2:  # the logits of those targets alone that the rows learn
        wanted: Tensor | slice = slice(start, stop)
        if index is not None:
            wanted, index = torch.unique(index, return_inverse=True)
        row, logits = row[wanted], _product(source[0][wanted], source[1])
    elif index is None:
        row, logits = row[start:stop], source[0][start:stop]
    else:
        logits = source[0]
    addresses = logits.data_ptr(), logits.dtype == torch.bfloat16, logits.stride(0), row.data_ptr(), column.data_ptr()
    return [logits, row, column, index], (*addresses, temperature, 0, _address(index))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T. torch's own fp32 product is another library than oneDNN, at half its rate (kernels/linear)."""
    if left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return pointwise(left, right)
    return left @ right.t()


def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_values(targets: list[Tensor], index: Tensor | None, C: int) -> None:
    for name, values, size in (("index", index, len(targets[0])), ("targets", targets[0], C)):
        if values is None or (name == "targets" and len(targets) > 1):
            continue
        low, high = (int(x) for x in values.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be 0 to {size - 1} but holds {low if low < 0 else high}")


def _for_triton(
    features: Tensor, prototypes: Tensor, targets: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if len(targets) > 1:
        targets = [x.float() if x.dtype == torch.float64 else x for x in targets]
        targets = [*(x.float().contiguous() for x in targets[:2]), *map(with_dense_rows, targets[2:])]
    else:
        targets = [targets[0].contiguous()]
    return with_dense_rows(features.to(dtype)), with_dense_rows(prototypes.to(dtype)), targets


def _problem(features: Tensor, prototypes: Tensor, targets: list[Tensor]) -> tuple[dict[str, int], torch.dtype]:
    """Sizes and the widest dtype of what is multiplied."""
    sizes = {"R": len(features), "C": len(prototypes), "E": features.shape[1]}
    if len(targets) < 4:
        return sizes, features.dtype
    return sizes | {"D": targets[2].shape[1]}, max(features.dtype, targets[2].dtype, key=lambda d: d.itemsize)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: SinkhornTargets | Tensor,
    *,
    index: Tensor | None = None,
    temperature: float = 0.12,
    split_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Mean over predictions of ``-sum_c t_c log_softmax(features prototypes^T / temperature)_c``.

    Args:
        features: (R, E) floating, normalised where the logits are to be cosines.
        prototypes: (C, E) floating.
        targets: SinkhornTargets of T rows and C prototypes, or (T,) int64 classes. No gradient reaches them. The rows
            of t need not sum to one; their sum is kept. With features and prototypes instead of logits the targets'
            logits are multiplied again where they are needed, in the dtype that they are given in, also under autocast.
        index: (R,) int64, the target that each prediction learns; without it T = R.
        temperature: divides the logits of the predictions.
        split_sizes: of runs of consecutive predictions, R in all, where each is to have a mean of its own: one call is
            cheaper than one a run, above all in the gradient of the prototypes.

    Returns:
        0-dim fp32 loss, with `split_sizes` (N,), with gradients for features and prototypes. Products are taken in the
        wider of the dtypes of features and prototypes, under autocast in its dtype (in fp32 where a CPU multiplies no
        bf16); softmax, sums and gradients are
        fp32, and the same every time. On a CPU in bf16 the gradient of the logits is stored as bf16, and each block's
        products with it are rounded to bf16 before they are summed in fp32. Logits, probabilities and gathered targets
        exist for a tile at a time, never for all of (R, C). Scores of any size that fp32 holds are served (tried up to
        1e8 times the usual); under fp16 autocast a gradient over 65,504 is infinite, as of any fp16 product.
        Backends: `triton` (fp32, bf16, fp16; E up to 512), `cpu` (fp32, bf16; fp16 as fp32), which computes the
        gradients in the forward (and again where those of several losses differ), and `reference` (fp32 with all of (R,
        C)).

    Raises:
        ValueError: shapes that do not fit together, no predictions, runs that are empty or not R in all, dtypes that
            are not floating, a temperature that is not positive; an index or a class out of range (on a CPU, elsewhere
            only under STELLAR_FAST_CHECK=1).

    Source: STELLAR (arXiv 2602.01905), online clustering.
    """
    sizes = check_shapes(features=(features, "RE"), prototypes=(prototypes, "CE"))
    if not sizes["R"]:
        raise ValueError("features has 0 rows: there is no mean over no predictions")
    check_positive(C=sizes["C"], E=sizes["E"], temperature=temperature)
    runs = [sizes["R"]] if split_sizes is None else list(split_sizes)
    if sum(runs) != sizes["R"] or any(run < 1 for run in runs):
        raise ValueError(f"split_sizes must be positive and {sizes['R']} in all, as features has rows, but are {runs}")
    check_floating(features=features, prototypes=prototypes)
    parts, target_temperature = _check_targets(targets, index, features, prototypes)
    if values_are_checked(features):
        _check_values(parts, index, sizes["C"])
    dtype = torch.promote_types(features.dtype, prototypes.dtype)
    autocast = autocast_dtype(features.device)
    if autocast is not None and dtype != torch.float64:
        dtype = autocast
    if len(parts) == 4:
        target_dtype = torch.promote_types(parts[2].dtype, parts[3].dtype)
        parts = parts[:2] + [x.to(target_dtype) for x in parts[2:]]
    name = backend.pick(_OPERATOR, features.device.type, _unfit(dtype, sizes["E"]))
    if name == "reference":
        features, prototypes = features.to(dtype), prototypes.to(dtype)
        return reference.prototype_cross_entropy(features, prototypes, targets, index, temperature, split_sizes)
    index = None if index is None else index.contiguous()
    keeps = torch.is_grad_enabled() and not surely(2 * sizes["R"] < sizes["E"])
    needs = [keeps and x.requires_grad for x in (features, prototypes)]
    losses, *_ = _forward(features, prototypes, parts, target_temperature, index, temperature, dtype, runs, needs, name)
    return losses.view(()) if split_sizes is None else losses


def _check_targets(
    targets: SinkhornTargets | Tensor, index: Tensor | None, features: Tensor, prototypes: Tensor
) -> tuple[list[Tensor], float]:
    """The tensors of the targets, without gradient, and their temperature."""
    rows = {"features": (features, "RE")} if index is None else {"index": (index, "R"), "features": (features, "RE")}
    letter = "R" if index is None else "T"
    if index is not None and index.dtype != torch.int64:
        raise ValueError(f"index must be torch.int64 but is {index.dtype}")
    if isinstance(targets, Tensor):
        check_shapes(**rows, targets=(targets, letter))
        if targets.dtype != torch.int64:
            raise ValueError(f"targets must be SinkhornTargets or torch.int64 classes but is {targets.dtype}")
        return [targets], 1.0
    named = {"targets.row": (targets.row, letter), "targets.column": (targets.column, "C")}
    if targets.logits is not None:
        named["targets.logits"] = targets.logits, letter + "C"
    elif targets.features is not None and targets.prototypes is not None:
        named |= {
            "targets.features": (targets.features, letter + "D"),
            "targets.prototypes": (targets.prototypes, "CD"),
        }
    else:
        raise ValueError("targets has neither logits nor features and prototypes")
    check_shapes(**rows, prototypes=(prototypes, "CE"), **named)
    check_floating(**{name: tensor for name, (tensor, _) in named.items()})
    check_positive(**{"targets.temperature": targets.temperature})
    return [tensor.detach() for tensor, _ in named.values()], targets.temperature


def _unfit(dtype: torch.dtype, width: int) -> tuple[tuple[str, str], ...]:
    if in_forward_mode():
        return tuple((name, "it has no forward-mode derivative") for name in ("triton", "cpu"))
    if dtype not in DTYPES:
        return tuple((name, f"it does not compute in {dtype}") for name in ("triton", "cpu"))
    return (("triton", f"E {width} is above {WIDEST}"),) if width > WIDEST else ()
