"""Folders of images, their views, and the order in which training sees them."""

from stellar_fast.data.folder import ImageFolder, TooManyUnreadable
from stellar_fast.data.loader import EpochSampler, MultiViewDataset
from stellar_fast.data.read import ImageReader, TooManyPixels, load_image
from stellar_fast.data.transform import MultiViewTransform, eval_transform

__all__ = [
    "EpochSampler",
    "ImageFolder",
    "ImageReader",
    "MultiViewDataset",
    "MultiViewTransform",
    "TooManyPixels",
    "TooManyUnreadable",
    "eval_transform",
    "load_image",
]
