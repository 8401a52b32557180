"""packed_patch_embed in Triton: kept patches go from the image through the projection to their place, in one kernel.

N images of a view, `kept` patches of each, R = N kept, D width, K sparse tokens; a patch is P x Q pixels, VALUES =
3 P Q numbers in the order of the weight. Pixels are read where they lie in the image and normalised in fp32 registers:
nothing has to fold into the weight, where 16 bits would lose it, and no patch is written but as a token. Programs of
the same patches run side by side, so that the pixels come from the image once and then from the cache. The backward
copies the pixels of all views into one matrix: the gradient of the weight is a product with it, which torch does.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stellar_fast.kernels.common.launch import launch
from stellar_fast.kernels.common.tl_dot import dot
from stellar_fast.kernels.packed_patch_embed.config import Config
from stellar_fast.registry import Shape

# One compilation serves every number of images and of kept patches, and every grid.
_jit = triton.jit(do_not_specialize=["R", "kept", "width", "token_rows", "K"])


@triton.jit
def _patch_of(row, keep_ptr, kept):
    """Image and patch of a row of the R kept ones."""
    image = row // kept
    if keep_ptr is None:
        patch = row - image * kept
    else:
        patch = tl.load(keep_ptr + row).to(tl.int32)
    return image, patch


@triton.jit
def _corner(image, patch, width, stride_n, stride_h, stride_w, P: tl.constexpr, Q: tl.constexpr):
    """Offset of a patch's first pixel; in 64 bits, as all offsets into images."""
    y, x = (patch // width * P).to(tl.int64), (patch % width * Q).to(tl.int64)
    return image.to(tl.int64) * stride_n + y * stride_h + x * stride_w


@triton.jit
def _colours(pointer):
    """The three values of a tensor (3,), read before the loop over a patch, where a load is waited for every time."""
    return tl.load(pointer).to(tl.float32), tl.load(pointer + 1).to(tl.float32), tl.load(pointer + 2).to(tl.float32)


@triton.jit
def _of_colour(colour, values):
    return tl.where(colour == 0, values[0], tl.where(colour == 1, values[1], values[2]))


@triton.jit
def _normalised(
    corner_ptr, i, mean, std, stride_c, stride_h, stride_w, P: tl.constexpr, Q: tl.constexpr, BLOCK_I: tl.constexpr
):
    """(pixel - mean) / std of values i (BLOCK_I) of patches (BLOCK_R) in fp32; finite for i >= VALUES too."""
    VALUES: tl.constexpr = 3 * P * Q
    colour = i // (P * Q)
    offset = colour.to(tl.int64) * stride_c + (i // Q % P).to(tl.int64) * stride_h + (i % Q).to(tl.int64) * stride_w
    if VALUES % BLOCK_I == 0:
        pixel = tl.load(corner_ptr[:, None] + offset[None, :])
    else:
        pixel = tl.load(corner_ptr[:, None] + offset[None, :], mask=(i < VALUES)[None, :], other=0)
    scale = 1.0 / _of_colour(colour, std)
    if corner_ptr.dtype.element_ty == tl.uint8:
        pixel = pixel.to(tl.float32) * (1.0 / 255)
    return (pixel.to(tl.float32) - _of_colour(colour, mean)[None, :]) * scale[None, :]


@_jit
def _forward_kernel(
    image_ptr,
    keep_ptr,  # (N, kept), None where all patches stay
    weight_ptr,  # (D, VALUES)
    bias_ptr,
    position_ptr,  # (1 + patches of an image, D)
    cls_ptr,
    sparse_ptr,  # (K, D)
    mean_ptr,
    std_ptr,
    out_ptr,  # (N (1 + kept + K), D): from the view's first row on
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    R,
    kept,
    width,
    token_rows,  # N (1 + K)
    K,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block, patch_blocks = tl.program_id(0) // column_blocks, tl.cdiv(R, BLOCK_R)
    d = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < D
    if block < patch_blocks:
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        image, patch = _patch_of(tl.minimum(row, R - 1), keep_ptr, kept)  # so that only stores need the mask
        corner_ptr = image_ptr + _corner(image, patch, width, stride_n, stride_h, stride_w, P, Q)
        mean, std = _colours(mean_ptr), _colours(std_ptr)
        mask = (row < R)[:, None] & d_mask[None, :]
        # the sum starts with what is added, so that no second tile is in registers at the end
        position = tl.load(position_ptr + (1 + patch)[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc = tl.load(bias_ptr + d, mask=d_mask, other=0.0).to(tl.float32)[None, :] + position.to(tl.float32)
        VALUES: tl.constexpr = 3 * P * Q
        for start in range(0, VALUES, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            pixel = _normalised(corner_ptr, i, mean, std, stride_c, stride_h, stride_w, P, Q, BLOCK_I)
            weight = tl.load(
                weight_ptr + d[None, :] * VALUES + i[:, None], mask=d_mask[None, :] & (i < VALUES)[:, None], other=0.0
            )
            acc = dot(pixel.to(weight.dtype), weight, acc)
        place = row.to(tl.int64) + image.to(tl.int64) * (1 + K) + 1  # after those of the images before it, and CLS
        tl.store(out_ptr + place[:, None] * D + d[None, :], acc, mask=mask)
    else:
        row = (block - patch_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        image, k = row // (1 + K), row % (1 + K) - 1
        is_cls = k < 0
        mask = (row < token_rows)[:, None] & d_mask[None, :]
        cls = tl.load(cls_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
        cls += tl.load(position_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
        token = tl.load(sparse_ptr + k[:, None] * D + d[None, :], mask=mask & ~is_cls[:, None], other=0.0)
        token = tl.where(is_cls[:, None], cls[None, :], token.to(tl.float32))
        place = image.to(tl.int64) * (1 + kept + K) + tl.where(is_cls, 0, 1 + kept + k)
        tl.store(out_ptr + place[:, None] * D + d[None, :], token, mask=mask)


@_jit
def _pixels_kernel(
    image_ptr,
    keep_ptr,
    mean_ptr,
    std_ptr,
    pixels_ptr,  # (R, VALUES)
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    R,
    kept,
    width,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    VALUES: tl.constexpr = 3 * P * Q
    slices: tl.constexpr = (VALUES + BLOCK_I - 1) // BLOCK_I
    row = tl.program_id(0) // slices * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.program_id(0) % slices * BLOCK_I + tl.arange(0, BLOCK_I)
    image, patch = _patch_of(tl.minimum(row, R - 1), keep_ptr, kept)
    corner_ptr = image_ptr + _corner(image, patch, width, stride_n, stride_h, stride_w, P, Q)
    mean, std = _colours(mean_ptr), _colours(std_ptr)
    pixel = _normalised(corner_ptr, i, mean, std, stride_c, stride_h, stride_w, P, Q, BLOCK_I)
    mask = (row < R)[:, None] & (i < VALUES)[None, :]
    tl.store(pixels_ptr + row.to(tl.int64)[:, None] * VALUES + i[None, :], pixel, mask=mask)


def launch_packed_patch_embed_fwd(
    images: Sequence[Tensor],
    keep_indices: Sequence[Tensor | None],
    counts: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls_token: Tensor,
    sparse_tokens: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Return (T, D) of `dtype`; the projection runs in the weight's. `counts`: patches that each view keeps.

    Images may have any strides. One launch a view.
    """
    (D, _, P, Q), K, tile = weight.shape, sparse_tokens.shape[0], config.forward
    flat, bias, cls_token, sparse_tokens, mean, std = (
        x.contiguous() for x in (weight.reshape(D, -1), bias, cls_token, sparse_tokens, mean, std)
    )
    rows = [view.shape[0] * (1 + kept + K) for view, kept in zip(images, counts, strict=True)]
    out = weight.new_empty(sum(rows), D, dtype=dtype)
    for view, keep, position, kept, part in zip(images, keep_indices, positions, counts, out.split(rows), strict=True):
        R, token_rows = view.shape[0] * kept, view.shape[0] * (1 + K)
        row_blocks = triton.cdiv(R, tile.block_r) + triton.cdiv(token_rows, tile.block_r)
        launch(
            _forward_kernel,
            (row_blocks * triton.cdiv(D, tile.block_d),),
            view,
            None if keep is None else keep.contiguous(),
            flat,
            bias,
            position.contiguous(),
            cls_token,
            sparse_tokens,
            mean,
            std,
            part,
            *view.stride(),
            R,
            kept,
            view.shape[3] // Q,
            token_rows,
            K,
            D=D,
            P=P,
            Q=Q,
            BLOCK_R=tile.block_r,
            BLOCK_D=tile.block_d,
            BLOCK_I=tile.block_i,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def launch_packed_patch_embed_bwd(
    images: Sequence[Tensor],
    keep_indices: Sequence[Tensor | None],
    counts: Sequence[int],
    patch: tuple[int, int],
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Return the normalised pixels of the kept patches of all views, (sum of R, VALUES) of `dtype`."""
    (P, Q), tile, mean, std = patch, config.backward, mean.contiguous(), std.contiguous()
    rows = [view.shape[0] * kept for view, kept in zip(images, counts, strict=True)]
    pixels = mean.new_empty(sum(rows), 3 * P * Q, dtype=dtype)
    for view, keep, kept, part in zip(images, keep_indices, counts, pixels.split(rows), strict=True):
        R = part.shape[0]
        launch(
            _pixels_kernel,
            (triton.cdiv(R, tile.block_r) * triton.cdiv(3 * P * Q, tile.block_i),),
            view,
            None if keep is None else keep.contiguous(),
            mean,
            std,
            part,
            *view.stride(),
            R,
            kept,
            view.shape[3] // Q,
            P=P,
            Q=Q,
            BLOCK_R=tile.block_r,
            BLOCK_I=tile.block_i,
            num_warps=tile.num_warps,
        )
    return pixels


def inspect_launches(shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """What ahead-of-time inspection compiles: under autocast from fp32 and uint8 images, and all in one dtype."""
    S, P, D, K, kept = (shape[letter] for letter in ("S", "p", "D", "K", "kept"))

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    keep, counts = [None, new(shape["M"], kept, dtype=torch.int64)], [(S // P) ** 2, kept]
    for pixels, tokens in ((torch.float32, torch.float32), (torch.uint8, torch.float32), (dtype, dtype)):
        images = [new(n, 3, S, S, dtype=pixels) for n in (shape["N"], shape["M"])]
        mean, std = new(3, dtype=tokens), new(3, dtype=tokens)
        position = new(1 + (S // P) ** 2, D, dtype=tokens)
        weight, bias, cls, sparse = new(D, 3, P, P, dtype=dtype), *(new(*s, dtype=tokens) for s in ((D,), (D,), (K, D)))
        launch_packed_patch_embed_fwd(
            images, keep, counts, weight, bias, [position, position], cls, sparse, mean, std, tokens, config
        )
        launch_packed_patch_embed_bwd(images, keep, counts, (P, P), mean, std, dtype, config)
