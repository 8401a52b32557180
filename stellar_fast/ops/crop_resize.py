"""crop_resize: many square views of one image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stellar_fast import backend, native


def crop_resize(
    image: np.ndarray | Tensor,
    boxes: np.ndarray | Tensor | Sequence[Sequence[int]],
    flips: np.ndarray | Tensor | Sequence[bool],
    size: int,
) -> Tensor:
    """Crop boxes out of an RGB image and resize each to a square, bicubic and antialiased, as Pillow does.

    Runs on the calling thread alone: data loaders run one process a core.

    Args:
        image: (H, W, 3) uint8 on the CPU, any strides.
        boxes: (N, 4) integers: top, left, height, width in pixels, inside the image.
        flips: (N,) booleans: mirror the view left to right.
        size: side S of the views in pixels.

    Returns:
        (N, 3, S, S) uint8; the `cpu` backend is within one grey level of the Pillow reference.

    Raises:
        ValueError: another shape or dtype, a box outside the image, counts that differ.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be uint8 of shape (H, W, 3) but is {pixels.dtype} of shape {pixels.shape}")
    rows = np.asarray(boxes)
    if rows.size == 0:
        rows = rows.reshape(0, 4).astype(np.int32)
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "iu":
        raise ValueError(f"boxes must be integers of shape (N, 4) but are {rows.dtype} of shape {rows.shape}")
    mirrored = np.asarray(flips, dtype=np.bool_)
    if mirrored.shape != (len(rows),):
        raise ValueError(f"there are {len(rows)} boxes but flips has shape {mirrored.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1 but is {size}")
    height, width, _ = pixels.shape
    outside = (rows[:, :2] < 0).any(1) | (rows[:, 2:] < 1).any(1) | (rows[:, :2] + rows[:, 2:] > (height, width)).any(1)
    if outside.any():
        box = rows[outside.argmax()].tolist()
        raise ValueError(
            f"box (top, left, height, width) = {box} must lie inside the image, which is {height} x {width}"
        )

    views = torch.empty(len(rows), 3, size, size, dtype=torch.uint8, device="cpu")
    if backend.pick("crop_resize") == "cpu":
        backend.ran("crop_resize", "cpu")
        _native_crop_resize(pixels, rows, mirrored, size, views)
    else:
        from stellar_fast.kernels.crop_resize import reference

        reference.crop_resize(pixels, rows, mirrored, size, views.numpy())
    return views


def _native_crop_resize(pixels: np.ndarray, boxes: np.ndarray, flips: np.ndarray, size: int, views: Tensor) -> None:
    if pixels.strides[1:] != (3, 1):
        pixels = np.ascontiguousarray(pixels)
    boxes = np.ascontiguousarray(boxes, dtype=np.int32)
    flips = np.ascontiguousarray(flips)
    height, width, _ = pixels.shape
    native.module().crop_resize(
        image=pixels.ctypes.data,
        height=height,
        width=width,
        row_stride=pixels.strides[0],
        boxes=boxes.ctypes.data,
        flips=flips.ctypes.data,
        count=len(boxes),
        size=size,
        out=views.data_ptr(),
    )
