"""From one image to its training views, or to the one that is encoded. Colour changes later, batched on the device."""

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stellar_fast.ops.crop_resize import crop_resize

RATIO = (3 / 4, 4 / 3)
TRIES = 10
LONG = 8  # a picture more than so many times as long as wide is cut to its middle before it is enlarged
CUBIC = Image.Resampling.BICUBIC
Box = tuple[int, int, int, int]  # top, left, height, width


class MultiViewTransform:
    """Global and local views of an image: random resized crops with flips. Global view 0 is the step's clean image.

    Args:
        image_size: side of the global views in pixels.
        local_size: side of the local views in pixels.
        num_global_views: V, the clean one included.
        num_local_views: L, may be 0.
        global_scale, local_scale: ranges of the share of the image's area that a crop covers.
        flip: probability of mirroring a view.

    Raises:
        ValueError: a size or count out of range.
    """

    def __init__(
        self,
        image_size: int,
        local_size: int,
        num_global_views: int,
        num_local_views: int,
        global_scale: tuple[float, float] = (0.36, 1.0),
        local_scale: tuple[float, float] = (0.06, 0.36),
        flip: float = 0.5,
    ):
        if num_global_views < 1 or num_local_views < 0:
            raise ValueError(
                f"at least 1 global and 0 local views are needed but {num_global_views} and {num_local_views} are asked"
            )
        for name, (low, high) in {"global_scale": global_scale, "local_scale": local_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must satisfy 0 < low <= high <= 1 but is ({low}, {high})")
        self.image_size = image_size
        self.local_size = local_size
        self.num_global_views = num_global_views
        self.num_local_views = num_local_views
        self.global_scale = global_scale
        self.local_scale = local_scale
        self.flip = flip

    def __call__(self, image: Image.Image | np.ndarray | Tensor, seed: int) -> dict[str, Tensor]:
        """Draw the views of one image.

        Args:
            image: RGB image, or uint8 of shape (H, W, 3).
            seed: the only source of randomness: the same seed gives the same views.

        Returns:
            `global_views` (V, 3, image_size, image_size) and `local_views` (L, 3, local_size, local_size), uint8.
        """
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        draw = random.Random(seed)
        boxes = [random_box(height, width, self.global_scale, draw) for _ in range(self.num_global_views)]
        flips = [draw.random() < self.flip for _ in boxes]
        local_boxes = [random_box(height, width, self.local_scale, draw) for _ in range(self.num_local_views)]
        local_flips = [draw.random() < self.flip for _ in local_boxes]
        return {
            "global_views": crop_resize(pixels, boxes, flips, self.image_size),
            "local_views": crop_resize(pixels, local_boxes, local_flips, self.local_size),
        }


def eval_transform(image: Image.Image, image_size: int) -> Tensor:
    """The view that is encoded: short side to 256/224 of `image_size`, then the central square.

    Args:
        image: RGB image.
        image_size: side S in pixels.

    Returns:
        (3, S, S) uint8.
    """
    short = round(image_size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    if scale > 1 and max(width, height) > LONG * short:
        return _to_tensor(_enlarged_middle(image, width, height, image_size))
    left, top = (width - image_size) // 2, (height - image_size) // 2
    resized = image.resize((width, height), CUBIC)
    return _to_tensor(resized.crop((left, top, left + image_size, top + image_size)))


def _enlarged_middle(image: Image.Image, width: int, height: int, side: int) -> Image.Image:
    """The central square of the image enlarged to width x height, from its middle alone.

    Width first, as Pillow enlarges: what is rounded and clipped in between depends on the order.
    """
    left, top = (width - side) // 2, (height - side) // 2
    if width > height:
        start, stop, taps, weights = _bicubic(image.width, width, left, left + side)
        columns = np.asarray(image.crop((start, 0, stop, image.height))).swapaxes(0, 1)
        part = Image.fromarray(_weighted(columns, taps - start, weights).swapaxes(0, 1).copy())
        return part.resize((side, height), CUBIC).crop((0, top, side, top + side))
    start, stop, taps, weights = _bicubic(image.height, height, top, top + side)
    rows = np.asarray(image.crop((0, start, image.width, stop)).resize((width, stop - start), CUBIC))
    return Image.fromarray(_weighted(rows, taps - start, weights)).crop((left, 0, left + side, side))


def _bicubic(length: int, long: int, first: int, last: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """How Pillow enlarges `length` pixels to `long`, for the N new ones from `first` to `last`.

    Returns:
        The first old pixel that is needed, the one after the last, and for each new one its 4 old ones (N, 4) and their
        weights (N, 4) in units of 2^-22.
    """
    centre = ((np.arange(first, last) + 0.5) * (length / long))[:, None]
    taps = np.floor(centre - 1.5).astype(np.int64) + np.arange(4)
    x = np.abs(taps - centre + 0.5)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    weights *= (x < 2) & (taps >= 0) & (taps < length)
    weights /= weights.sum(1, keepdims=True)
    taps = taps.clip(0, length - 1)
    return int(taps[0, 0]), int(taps[-1, -1]) + 1, taps, np.trunc(weights * 2**22 + np.copysign(0.5, weights))


def _weighted(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N, W, 3) uint8 sums of 4 `rows` (L, W, 3) each."""
    total = np.full((len(taps), *rows.shape[1:]), 2**21, np.int32)
    for tap, weight in zip(taps.T, weights.T.astype(np.int32), strict=True):
        total += rows[tap] * weight[:, None, None]
    return (total >> 22).clip(0, 255).astype(np.uint8)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def centre_square(height: int, width: int) -> Box:
    """The central square box that holds the short side."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def random_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> Box:
    """The box of a random resized crop: area uniform in `scale`, log of the aspect ratio uniform in that of RATIO.

    A box that does not fit is drawn again; after TRIES of them the largest central one within RATIO is taken.
    """
    for _ in range(TRIES):
        area = height * width * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return draw.randint(0, height - box_height), draw.randint(0, width - box_width), box_height, box_width
    box_height = max(1, min(height, round(width / RATIO[0])))
    box_width = max(1, min(width, round(height * RATIO[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
