"""packed_patch_embed: the tokens of several views, from the pixels of the kept patches alone.

N images of a view, P patches of its grid, D width, K sparse tokens, T rows of all sequences.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.common.precision import at_least_fp32, without_autocast
from stellar_fast.kernels.packed_patch_embed import reference
from stellar_fast.ops.checks import autocast_dtype, check_devices, check_shapes, in_forward_mode, values_are_checked
from stellar_fast.ops.linear import linear
from stellar_fast.tune.lookup import knobs

RANGE_SLACK = 1e-3  # resizing overshoots by rounding; what is normalised or up to 255 is far beyond
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton kernels; images may be uint8 too
_OPERATOR = "packed_patch_embed"


def check_images(images: Tensor, patch_size: int, name: str = "images", values: bool = True) -> None:
    """Raise ValueError unless `images` is (N, 3, H, W), uint8 or floating in [0, 1], of at least one patch.

    With `values` they are read on a CPU; on CUDA, where reading waits for the device, only under STELLAR_FAST_CHECK=1.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be (B, 3, H, W) but has shape {tuple(images.shape)}")
    if min(images.shape[-2:]) < patch_size:
        raise ValueError(
            f"{name} of {images.shape[-2]}x{images.shape[-1]} pixels hold no patch of {patch_size}x{patch_size}"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{name} must be uint8 or floating point in [0, 1] but is {images.dtype}")
    if values and images.numel() and values_are_checked(images):
        low, high = (bound.item() for bound in torch.aminmax(images.detach()))
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(f"{name} must lie in [0, 1] but span [{low:.6g}, {high:.6g}]; do not normalise them")


def check_keep_indices(keep_indices: Tensor, num_images: int, num_patches: int) -> None:
    """Raise ValueError unless `keep_indices` is (num_images, kept) int64 with patches of the image; values as above."""
    shape = tuple(keep_indices.shape)
    if len(shape) != 2 or shape[0] != num_images or not 1 <= shape[1] <= num_patches:
        raise ValueError(f"keep_indices must be ({num_images}, 1 to {num_patches}) but has shape {shape}")
    if keep_indices.dtype != torch.int64:
        raise ValueError(f"keep_indices must be torch.int64 but is {keep_indices.dtype}")
    if keep_indices.numel() and values_are_checked(keep_indices):
        low, high = (bound.item() for bound in torch.aminmax(keep_indices))
        if low < 0 or high >= num_patches:
            raise ValueError(f"keep_indices span [{low}, {high}] but the image has {num_patches} patches")


def to_unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as floating point in [0, 1], from that or from uint8."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


# keep_indices: (N, kept), or (0,) for all patches. A list with None in it is no list of tensors to register_autograd,
# one without is, and they want differently shaped gradients. The weight has the projection's dtype, `dtype` is out's.
@torch.library.custom_op("stellar_fast::packed_patch_embed", mutates_args=())
def _forward(
    images: Sequence[Tensor],
    keep_indices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    from stellar_fast.kernels.packed_patch_embed import config, kernel

    backend.ran(_OPERATOR, name)
    counts, keeps = _counts(images, keep_indices, weight.shape[-2:]), [_or_all(keep) for keep in keep_indices]
    chosen = knobs(_OPERATOR, config, {"D": weight.shape[0]}, weight.dtype, weight.device)
    tokens = bias, positions, cls_token, sparse_tokens
    return kernel.launch_packed_patch_embed_fwd(images, keeps, counts, weight, *tokens, mean, std, dtype, chosen)


@_forward.register_fake
def _(images, keep_indices, weight, bias, positions, cls_token, sparse_tokens, mean, std, dtype, name):
    counts = _counts(images, keep_indices, weight.shape[-2:])
    T = sum(view.shape[0] * (1 + kept + sparse_tokens.shape[0]) for view, kept in zip(images, counts, strict=True))
    return weight.new_empty(T, weight.shape[0], dtype=dtype)


# Returns grad_weight (D, 3, p, q) in `dtype`, (0,) where it is not needed, then for each view the sums (1 + P + K, D)
# of the gradients of what CLS, every patch of the grid and the sparse tokens became, in fp32: the other gradients.
@torch.library.custom_op("stellar_fast::packed_patch_embed_backward", mutates_args=())
def _backward(
    grad: Tensor,
    images: Sequence[Tensor],
    keep_indices: Sequence[Tensor],
    mean: Tensor,
    std: Tensor,
    patch: Sequence[int],
    num_sparse_tokens: int,
    needs_weight: bool,
    dtype: torch.dtype,
    name: str,
) -> list[Tensor]:
    from stellar_fast.kernels.packed_patch_embed import config, kernel

    backend.ran(_OPERATOR, name)
    D, (p, q), K = grad.shape[1], patch, num_sparse_tokens
    counts, keeps = _counts(images, keep_indices, patch), [_or_all(keep) for keep in keep_indices]
    sequences = grad.split([view.shape[0] * (1 + kept + K) for view, kept in zip(images, counts, strict=True)])
    grads = [g.unflatten(0, (view.shape[0], 1 + n + K)) for g, view, n in zip(sequences, images, counts, strict=True)]
    sums = [_sums(g, keep, _num_patches(view, patch), K) for g, keep, view in zip(grads, keeps, images, strict=True)]
    if not needs_weight:
        return [grad.new_empty(0, dtype=dtype), *sums]
    kept_rows = [view.shape[0] * kept for view, kept in zip(images, counts, strict=True)]
    rows = grad.new_empty(sum(kept_rows), D, dtype=dtype)
    for part, g, kept in zip(rows.split(kept_rows), grads, counts, strict=True):
        part.view(g.shape[0], kept, D).copy_(g[:, 1 : 1 + kept])
    chosen = knobs(_OPERATOR, config, {"D": D}, dtype, grad.device)
    pixels = kernel.launch_packed_patch_embed_bwd(images, keeps, counts, (p, q), mean, std, dtype, chosen)
    return [(rows.mT @ pixels).view(D, 3, p, q), *sums]


@_backward.register_fake
def _(grad, images, keep_indices, mean, std, patch, num_sparse_tokens, needs_weight, dtype, name):
    D, (p, q) = grad.shape[1], patch
    lengths = [1 + _num_patches(view, patch) + num_sparse_tokens for view in images]
    sums = [grad.new_empty(length, D, dtype=torch.float32) for length in lengths]
    return [grad.new_empty((D, 3, p, q) if needs_weight else 0, dtype=dtype), *sums]


def _sums(grad: Tensor, keep: Tensor | None, num_patches: int, num_sparse_tokens: int) -> Tensor:
    """Gradients (N, 1 + kept + K, D) summed over images in fp32, each patch at its place of the grid.

    A patch may be kept twice. index_add_ keeps torch's word on determinism: atomics unless algorithms have to be.
    """
    if keep is None:
        return grad.sum(0, dtype=torch.float32)
    N, end = keep.shape[0], 1 + num_patches
    cls = keep.new_zeros(N, 1)
    sparse = torch.arange(end, end + num_sparse_tokens, device=keep.device).expand(N, -1)
    places = torch.cat((cls, 1 + keep, sparse), dim=1).flatten()
    sums = grad.new_zeros(end + num_sparse_tokens, grad.shape[2], dtype=torch.float32)
    return sums.index_add_(0, places, grad.flatten(0, 1).to(torch.float32))


def _save(ctx, inputs, output) -> None:
    images, keep_indices, weight, bias, positions, cls_token, sparse_tokens, mean, std, _, ctx.name = inputs
    ctx.save_for_backward(*images, *keep_indices, mean, std)
    ctx.patch, ctx.num_sparse_tokens = list(weight.shape[-2:]), sparse_tokens.shape[0]
    ctx.dtypes = weight.dtype, bias.dtype, [x.dtype for x in positions], cls_token.dtype, sparse_tokens.dtype


def _differentiate(ctx, grad: Tensor):
    *views, mean, std = ctx.saved_tensors
    n, K = len(views) // 2, ctx.num_sparse_tokens
    weight_dtype, bias_dtype, position_dtypes, cls_dtype, sparse_dtype = ctx.dtypes
    needs_weight = ctx.needs_input_grad[2]
    grad_weight, *sums = _backward(
        grad, views[:n], views[n:], mean, std, ctx.patch, K, needs_weight, weight_dtype, ctx.name
    )
    grad_positions = [x[: x.shape[0] - K].to(dtype) for x, dtype in zip(sums, position_dtypes, strict=True)]
    grad_bias = torch.stack([x[1 : x.shape[0] - K].sum(0) for x in sums]).sum(0)
    grad_cls = torch.stack([x[0] for x in sums]).sum(0)
    grad_sparse = torch.stack([x[x.shape[0] - K :] for x in sums]).sum(0)
    no_grads = [None] * n
    return (
        no_grads,
        no_grads,
        grad_weight if needs_weight else None,
        grad_bias.to(bias_dtype),
        grad_positions,
        grad_cls.to(cls_dtype),
        grad_sparse.to(sparse_dtype),
        *(None,) * 4,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def packed_patch_embed(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    keep_indices: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Sequences [CLS, kept patches, sparse tokens] of all images of all views, one after another.

    Args:
        images: of each view (N, 3, H, W), uint8 or floating in [0, 1]; a remainder of the patch size is ignored.
        weight: (D, 3, p, q) of the patch projection.
        bias: (D,).
        positions: of each view (1 + P, D): of CLS, then of its P = (H // p) (W // q) patches in row order.
        cls_token: (D,).
        sparse_tokens: (K, D).
        mean: (3,) of the colours.
        std: (3,) of the colours, folded into the projection with `mean`.
        keep_indices: of each view (N, kept) int64 patches that stay, or None for all.

    Returns:
        (T, D) of the dtype that positions and tokens have, sum over views of N (1 + kept + K) rows; the projection runs
        in the autocast dtype. Gradients for everything but uint8 images. Backends: `triton` (fp32, bf16, fp16; without
        gradients of images, mean and std; reads the kept pixels where they are), `torch` (gathers the kept pixels, one
        `linear` for all views), `reference` (fp32).

    Raises:
        ValueError: shapes that do not fit together, images out of range, patches that the image does not have.

    Source: MAE (arXiv 2111.06377) for embedding what is kept; STELLAR (arXiv 2602.01905) for the sequence.
    """
    sizes = check_shapes(
        weight=(weight, "DCpq"), bias=(bias, "D"), cls_token=(cls_token, "D"), sparse_tokens=(sparse_tokens, "KD")
    )
    check_shapes(mean=(mean, "C"), std=(std, "C"), weight=(weight, "DCpq"))
    keep_indices = [None] * len(images) if keep_indices is None else keep_indices
    if not len(images) == len(positions) == len(keep_indices):
        raise ValueError(
            f"there are {len(images)} images, {len(positions)} positions and {len(keep_indices)} keep_indices"
        )
    patch = sizes["p"], sizes["q"]
    for view, position, keep in zip(images, positions, keep_indices, strict=True):
        check_devices(weight=weight, images=view, positions=position, **{} if keep is None else {"keep_indices": keep})
        check_images(view, max(patch))
        num_patches = _num_patches(view, patch)
        if tuple(position.shape) != (1 + num_patches, sizes["D"]):
            raise ValueError(f"positions must be {(1 + num_patches, sizes['D'])} but has shape {tuple(position.shape)}")
        if keep is not None:
            check_keep_indices(keep, view.shape[0], num_patches)
    tensors = weight, bias, *positions, cls_token, sparse_tokens
    name = backend.pick(_OPERATOR, weight.device.type, _unfit(images, tensors, mean, std))
    if name == "triton":
        projected = weight.to(autocast_dtype(weight.device) or weight.dtype)
        dtypes = projected.dtype, cls_token.dtype, sparse_tokens.dtype, *(position.dtype for position in positions)
        keeps = [weight.new_empty(0, dtype=torch.int64) if keep is None else keep for keep in keep_indices]
        dtype = functools.reduce(torch.promote_types, dtypes)
        tokens = bias, list(positions), cls_token, sparse_tokens
        return _forward(list(images), keeps, projected, *tokens, mean, std, dtype, name)
    if name == "reference":
        out = reference.packed_patch_embed(
            images, weight, bias, positions, cls_token, sparse_tokens, mean=mean, std=std, keep_indices=keep_indices
        )
        return out.to(torch.promote_types(sparse_tokens.dtype, positions[0].dtype))

    dtype = at_least_fp32(weight).dtype
    pixels = [_kept_pixels(view, keep, patch, dtype) for view, keep in zip(images, keep_indices, strict=True)]
    counts = [p.shape[0] * p.shape[1] for p in pixels]
    patches = _project(torch.cat([p.flatten(0, 1) for p in pixels]), weight, bias, mean, std)
    sequences = []
    for rows, p, position, keep in zip(patches.split(counts), pixels, positions, keep_indices, strict=True):
        N, kept = p.shape[:2]
        # an embedding's gradient is summed in order, that of an index by as many threads as there are at once
        place = position[1:] if keep is None else F.embedding(keep, position[1:])
        cls = (cls_token + position[0]).expand(N, 1, -1)
        sparse = sparse_tokens.expand(N, -1, -1)
        sequences.append(torch.cat((cls, rows.view(N, kept, rows.shape[1]) + place, sparse), dim=1).flatten(0, 1))
    return torch.cat(sequences)


def _unfit(
    images: Sequence[Tensor], tensors: Sequence[Tensor], mean: Tensor, std: Tensor
) -> tuple[tuple[str, str], ...]:
    """Why Triton cannot take this call."""
    dtypes = {x.dtype for x in (*tensors, mean, std)} | {x.dtype for x in images if x.dtype != torch.uint8}
    dtypes -= {*DTYPES}
    reason = ""
    if in_forward_mode():
        reason = "it has no forward-mode derivative"
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (*images, mean, std)):
        reason = "it has no gradient of images, mean and std"
    elif dtypes:
        reason = f"it does not compute in {' and '.join(sorted(map(str, dtypes)))}"
    return (("triton", reason),) if reason else ()


def _or_all(keep: Tensor) -> Tensor | None:
    return keep if keep.dim() == 2 else None


def _counts(images: Sequence[Tensor], keep_indices: Sequence[Tensor], patch: Sequence[int]) -> list[int]:
    """Of each view, how many patches of an image stay."""
    return [
        _num_patches(view, patch) if keep.dim() == 1 else keep.shape[1]
        for view, keep in zip(images, keep_indices, strict=True)
    ]


def _num_patches(images: Tensor, patch: Sequence[int]) -> int:
    return (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])


def _project(pixels: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Patches (R, D) of pixels (R, 3, p, q) in [0, 1], with the colours normalised."""
    autocast = autocast_dtype(pixels.device) is not None
    reduced = autocast or weight.dtype in (torch.bfloat16, torch.float16)
    with without_autocast(pixels):
        if reduced:  # 16 bits hold little of a pixel before its mean is gone: folded, gradients were 3 times as far off
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
            folded, shift = weight, bias
        else:
            folded = weight / std[:, None, None]
            shift = bias - (folded * mean[:, None, None]).sum(dim=(1, 2, 3))
    rows = pixels.flatten(1)
    return linear(rows if autocast else rows.to(weight.dtype), folded.flatten(1), shift)


def _kept_pixels(images: Tensor, keep: Tensor | None, patch: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Pixels of the kept patches in [0, 1], (N, kept, 3, p, q)."""
    N, _, H, W = images.shape
    height, width = H // patch[0], W // patch[1]
    whole = images[..., : height * patch[0], : width * patch[1]]
    grid = whole.unflatten(3, (width, patch[1])).unflatten(2, (height, patch[0])).permute(0, 2, 4, 1, 3, 5)
    if keep is None:
        return to_unit_range(grid.reshape(N, height * width, 3, *patch), dtype)
    image = torch.arange(N, device=keep.device)[:, None]
    return to_unit_range(grid[image, keep // width, keep % width], dtype)
