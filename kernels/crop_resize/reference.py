"""Pillow's crop and bicubic resize. H x W image, N crops, S output side."""

import numpy as np
from PIL import Image


def crop_resize(
    image_HWC: np.ndarray, boxes_N4: np.ndarray, flips_N: np.ndarray, size: int, out_N3SS: np.ndarray
) -> None:
    """Write the uint8 crops into `out_N3SS`."""
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    for (top, left, height, width), flip, out_3SS in zip(boxes_N4.tolist(), flips_N, out_N3SS, strict=True):
        crop = image.crop((left, top, left + width, top + height))
        # One axis at a time, width first: Pillow >= 13 alone would take the height first for some tall crops.
        crop = crop.resize((size, height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
        if flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out_3SS[...] = np.asarray(crop).transpose(2, 0, 1)
