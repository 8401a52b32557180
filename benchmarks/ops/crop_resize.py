"""Pillow, as torchvision's RandomResizedCrop calls it: crop, one bicubic resize, flip. And torch's own resize."""

import numpy as np
import torch
import torch.nn.functional as F
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


def interpolate(image: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    channels_last = image.permute(2, 0, 1)[None]
    views = []
    for (top, left, height, width), flip in zip(boxes.tolist(), flips.tolist(), strict=True):
        crop = channels_last[:, :, top : top + height, left : left + width]
        view = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
        views.append(view.flip(3) if flip else view)
    return torch.cat(views).contiguous()


PROVIDERS = {"plain": plain, "torch.interpolate": interpolate}
