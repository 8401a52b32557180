"""Pillow, as torchvision's RandomResizedCrop calls it: crop, one bicubic resize, flip."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def plain(image: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    picture = Image.fromarray(image.numpy())
    views = []
    for (top, left, height, width), flip in zip(boxes.tolist(), flips.tolist(), strict=True):
        view = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        if flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(np.asarray(view).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(views))


PROVIDERS = {"plain": plain}
