"""Folders of images, their views, and the order in which training sees them."""

from stellar_fast.data.folder import ImageFolder, TooManyUnreadable, load_image
from stellar_fast.data.loader import EpochSampler, MultiViewDataset
from stellar_fast.data.transform import MultiViewTransform, eval_transform

__all__ = [
    "EpochSampler",
    "ImageFolder",
    "MultiViewDataset",
    "MultiViewTransform",
    "TooManyUnreadable",
    "eval_transform",
    "load_image",
]
