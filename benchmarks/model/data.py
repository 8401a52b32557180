"""Training views of photos, decoding excluded: random resized crops with flips, all providers from the same boxes.

On one thread, as data loaders run: one process a core. Upstream crops with Pillow; torch.interpolate is the resize that
torchvision's transforms of tensors call.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.model.pair import Case, Check
from benchmarks.operators import INTEGER_TOLERANCE
from benchmarks.shapes import ModelShape

BATCH = 8  # photos
HEIGHT, WIDTH = 375, 500
SCALES = {"global": (0.36, 1.0), "local": (0.06, 0.36)}

Crops = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # image, boxes, flips, size -> views


def photos(count: int) -> list[np.ndarray]:
    """Smooth colours with noise, (H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(1)
    fields = torch.rand(count, 3, 6, 8, generator=generator)
    images = torch.nn.functional.interpolate(fields, size=(HEIGHT, WIDTH), mode="bicubic")
    images = (images + 0.2 * torch.rand(images.shape, generator=generator) - 0.1).clamp(0, 1)
    return list((255 * images).byte().permute(0, 2, 3, 1).contiguous().numpy())


def _cropped_by(crops: Crops, shape: ModelShape) -> Callable[[np.ndarray, int], dict[str, Tensor]]:
    """A transform that draws as MultiViewTransform does."""
    from stellar_fast.data.transform import random_box

    kinds: Sequence[tuple[str, int, int]] = (
        ("global", shape.num_masks, shape.image_size),
        ("local", shape.num_local_crops, shape.local_size),
    )

    def views(pixels: np.ndarray, seed: int) -> dict[str, Tensor]:
        draw, image, found = random.Random(seed), torch.from_numpy(pixels), {}
        for kind, count, size in kinds:
            boxes = [random_box(HEIGHT, WIDTH, SCALES[kind], draw) for _ in range(count)]
            flips = [draw.random() < 0.5 for _ in boxes]
            found[f"{kind}_views"] = crops(image, torch.tensor(boxes), torch.tensor(flips), size)
        return found

    return views


def build_case(shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]) -> Case:
    """Verify the views of every provider against Pillow's, and return what to time."""
    from benchmarks.ops import crop_resize  # needs Pillow, which no other model suite does
    from stellar_fast.data import MultiViewTransform

    images = photos(batch)
    transforms = {"plain": _cropped_by(crop_resize.plain, shape)}
    if "libraries" in providers:
        transforms["torch.interpolate"] = _cropped_by(crop_resize.interpolate, shape)
    if "stellar_fast" in providers:
        sizes = shape.image_size, shape.local_size, shape.num_masks, shape.num_local_crops
        transforms["stellar_fast"] = MultiViewTransform(*sizes)
    exact = transforms["plain"](images[0], 0)

    def call(views: Callable) -> Callable[[], list]:
        return lambda: [views(image, seed) for seed, image in enumerate(images)]

    written = sum(x.numel() for x in exact.values())
    return Case(
        suite="data",
        shape=f"{HEIGHT}x{WIDTH} to {shape.num_masks} of {shape.image_size}px and {shape.num_local_crops} of "
        f"{shape.local_size}px",
        batch=batch,
        flops=0.0,
        bytes=batch * (3 * HEIGHT * WIDTH + written),
        calls={name: call(views) for name, views in transforms.items()},
        checks={name: _checks(views(images[0], 0), exact) for name, views in transforms.items()},
        preset=shape.preset,
        threads=1,
    )


def _checks(found: dict[str, Tensor], exact: dict[str, Tensor]) -> list[Check]:
    """More than one grey level from Pillow in hardly any value."""
    shares = {name: ((found[name].int() - want.int()).abs() > 1).double().mean() for name, want in exact.items()}
    return [Check(name, share.item() / INTEGER_TOLERANCE) for name, share in shares.items()]
