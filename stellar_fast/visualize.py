"""Pictures of what a model sees: token maps, hard segmentation, principal components, and a panel of them all.

Images are (H, W, 3) uint8 RGB arrays; features are one image's, on any device. P patches of a (height, width) grid in
row order, K sparse tokens, D width. Drawn with Pillow and numpy alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from stellar_fast.files import PICTURE, check_output, mark, printable, write_atomically

Pixels = NDArray[np.uint8]
Grid = tuple[int, int]
Tile = tuple[Pixels, str]

_INK, _PAPER, _DIM = (32, 33, 36), (255, 255, 255), (110, 113, 120)
_GAP = 10


def to_pixels(image: Tensor) -> Pixels:
    """A (3, H, W) tensor, uint8 or floating point in [0, 1], as an (H, W, 3) array; ValueError where not finite."""
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        if not image.isfinite().all():
            raise ValueError(f"{int((~image.isfinite()).sum())} of {image.numel()} values of an image are not finite")
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def psnr(image: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio of two images of one size, in dB; infinite for equal ones."""
    if image.shape != other.shape:
        raise ValueError(f"images of different shapes have no PSNR: {image.shape} and {other.shape}")
    error = float(np.mean((image.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def token_colours(num_tokens: int) -> Pixels:
    """(K, 3) colours that the eye tells apart: even steps of hue in OKLCH, neighbours in lightness alternating.

    Source: Björn Ottosson, "A perceptual color space for image processing" (the OKLab matrices).
    """
    index = np.arange(num_tokens)
    hue = 2 * np.pi * (index / num_tokens + 0.08)
    lightness = np.where(index % 2 == 0, 0.74, 0.60)
    chroma = np.full(num_tokens, 0.155)
    lab = np.stack((lightness, chroma * np.cos(hue), chroma * np.sin(hue)), axis=1)
    lms = lab @ np.array(
        [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    linear = (lms**3) @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (srgb * 255).round().astype(np.uint8)


def token_shares(spatial: Tensor) -> NDArray[np.float64]:
    """(K,) share of the patches whose largest entry in the localization matrix (P, K) is each token's."""
    num_patches, num_tokens = spatial.shape
    return np.bincount(spatial.argmax(dim=1).cpu().numpy(), minlength=num_tokens) / num_patches


def token_maps(image: Pixels, spatial: Tensor, grid: Grid) -> list[Tile]:
    """Where each token looks: (picture, caption) of all K tokens, the one with the largest area first.

    The photo is dimmed to grey and lit in the token's colour where the token's share of a patch is high.

    Args:
        image: (H, W, 3) uint8.
        spatial: (P, K) localization matrix; rows sum to one.
        grid: patches in height and width.
    """
    weights = _upsample(spatial, grid, image.shape)
    colours = token_colours(spatial.shape[1]).astype(np.float32)
    shares = token_shares(spatial)
    peaks = spatial.float().amax(dim=0).cpu().numpy()
    grey = _grey(image)
    tiles = []
    for token in _by_area(shares, peaks):
        # Full light at the token's peak, but a token that wins nowhere stays as dark as it is.
        light = (weights[..., token] / max(float(peaks[token]), 0.35)).clip(0, 1)[..., None]
        lit = 0.40 * image + 0.60 * colours[token] * (0.55 + 0.45 * grey / 255)
        picture = (1 - light) * (0.34 * grey + 14) + light * lit
        tiles.append((_uint8(picture), f"token {token} · {100 * shares[token]:.0f} %"))
    return tiles


def segmentation_overlay(image: Pixels, spatial: Tensor, grid: Grid) -> Pixels:
    """The photo coloured by the token that wins each pixel of the smoothly enlarged maps, with thin borders.

    Args as in `token_maps`. Returns (H, W, 3) uint8.
    """
    winner = _upsample(spatial, grid, image.shape).argmax(axis=-1)
    colours = token_colours(spatial.shape[1]).astype(np.float32)[winner]
    shade = 0.60 + 0.55 * _grey(image) / 255  # keeps the photo's light and dark under flat colours
    picture = 0.28 * image + 0.72 * colours * shade
    border = np.zeros(winner.shape, dtype=bool)
    border[:-1] |= winner[:-1] != winner[1:]
    border[:, :-1] |= winner[:, :-1] != winner[:, 1:]
    picture[border] = 0.35 * picture[border] + 0.65 * 255
    return _uint8(picture)


def pca_rgb(dense: Tensor, grid: Grid, size: tuple[int, int] | None = None) -> Pixels:
    """The first three principal components of patch features as red, green and blue.

    Signs are fixed (the entry of largest size is positive); each component runs from its 2nd to its 98th percentile.

    Args:
        dense: (P, D) features.
        grid: patches in height and width.
        size: height and width of the result in pixels; None gives one pixel a patch.
    """
    _check_grid(dense, grid)
    features = dense.detach().double().cpu()
    u, s, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    real = s[:3] > 1e-6 * features.norm()  # what is left below is rounding, and stays grey
    components = (u * s)[:, :3]
    extreme = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(extreme < 0, -1.0, 1.0)
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    rgb = torch.full((len(features), 3), 0.5, dtype=torch.float64)
    scaled = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    rgb[:, : scaled.shape[1]] = torch.where(real, scaled, 0.5)
    return _uint8(255 * _upsample(rgb, grid, size or grid))


def grid_figure(
    rows: Sequence[Sequence[Tile]],
    width: int = 1280,
    title: str = "",
    swatches: dict[str, tuple[int, int, int]] | None = None,
) -> Image.Image:
    """Lay rows of (picture, caption) out under each other, every row as wide as the figure.

    Args:
        rows: the tiles of one row are as wide as each other; rows may hold different numbers of tiles.
        width: of the figure in pixels.
        title: one line over the first row.
        swatches: a colour to draw before a caption, by caption.
    """
    font, bold = ImageFont.load_default(15), ImageFont.load_default(20)
    caption_height, top = 26, 44 if title else _GAP
    layout, y = [], top
    for row in rows:
        side = (width - _GAP * (len(row) + 1)) / len(row)
        heights = [round(side * pixels.shape[0] / pixels.shape[1]) for pixels, _ in row]
        for i, ((pixels, caption), height) in enumerate(zip(row, heights, strict=True)):
            layout.append((pixels, caption, round(_GAP + i * (side + _GAP)), y, round(side), height))
        y += max(heights) + caption_height + _GAP // 2
    figure = Image.new("RGB", (width, y), _PAPER)
    draw = ImageDraw.Draw(figure)
    if title:
        draw.text((_GAP, top // 2), _fit(draw, title, bold, width - 2 * _GAP), _INK, bold, anchor="lm")
    for pixels, caption, x, y, tile_width, tile_height in layout:
        figure.paste(Image.fromarray(pixels).resize((tile_width, tile_height), Image.Resampling.LANCZOS), (x, y))
        text_x, text_y = x, y + tile_height + caption_height // 2
        if swatches and caption in swatches:
            draw.rounded_rectangle((x, text_y - 6, x + 12, text_y + 6), 3, swatches[caption])
            text_x += 18
        draw.text((text_x, text_y), _fit(draw, caption, font, x + tile_width - text_x), _DIM, font, anchor="lm")
    return figure


def token_rows(tiles: Sequence[Tile], columns: int) -> list[list[Tile]]:
    """Tiles of one size in rows of `columns`, the last one filled up with white."""
    blank: Tile = (np.full_like(tiles[0][0], 255), "")
    rows = [list(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    rows[-1] += [blank] * (columns - len(rows[-1]))
    return rows


def panel(
    image: Pixels,
    spatial: Tensor,
    dense: Tensor,
    grid: Grid,
    *,
    title: str = "",
    reconstruction: Pixels | None = None,
    width: int = 1280,
) -> Image.Image:
    """Everything about one image: photo, segmentation, components, reconstruction where there is one, all token maps.

    Args:
        image: (H, W, 3) uint8, what the encoder saw.
        spatial: (P, K) localization matrix.
        dense: (P, D) patch features.
        grid: patches in height and width.
        title: first line, such as the file's name.
        reconstruction: (H', W', 3) uint8.
        width: of the figure in pixels.
    """
    _check_grid(spatial, grid)
    shares = token_shares(spatial)
    used = int((shares >= 0.02).sum())
    first: list[Tile] = [
        (image, "photo"),
        (segmentation_overlay(image, spatial, grid), f"strongest token · {used} of {len(shares)} win 2 % or more"),
        (pca_rgb(dense, grid, image.shape[:2]), "dense features · first 3 components"),
    ]
    if reconstruction is not None:
        original = image
        if reconstruction.shape != image.shape:
            height, width_ = reconstruction.shape[:2]
            original = np.asarray(Image.fromarray(image).resize((width_, height), Image.Resampling.BICUBIC))
        first.append((reconstruction, f"reconstruction · {psnr(original, reconstruction):.1f} dB"))
    maps = token_maps(image, spatial, grid)
    colours = token_colours(len(shares))
    swatches = {caption: tuple(int(c) for c in colours[int(caption.split()[1])]) for _, caption in maps}
    return grid_figure([first, *token_rows(maps, 2 * len(first))], width, title, swatches)  # type: ignore[arg-type]


def save_panel(path: str | Path, *args, kind: str = PICTURE, overwrite: bool = False, **kwargs) -> Path:
    """Draw a `panel` and write it as `save_image` does. Returns the path."""
    return save_image(path, panel(*args, **kwargs), kind=kind, overwrite=overwrite)


def save_image(path: str | Path, image: Image.Image | Pixels, *, kind: str = PICTURE, overwrite: bool = False) -> Path:
    """Write a PNG that appears whole; missing folders are made. Returns the path.

    Raises:
        ValueError: a file is there that is not of this package and kind, and `overwrite` is not set.
    """
    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("Software", mark(kind))
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="PNG", pnginfo=about)
    write_atomically(check_output(path, kind=kind, overwrite=overwrite), buffer.getvalue())
    return Path(path)


def _check_grid(features: Tensor, grid: Grid) -> None:
    if features.ndim != 2 or features.shape[0] != grid[0] * grid[1]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} are not (P, ...) with P = {grid[0]} x {grid[1]} patches"
        )
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"features of {int((~finite).sum())} of {len(finite)} patches are not finite")


def _upsample(maps: Tensor, grid: Grid, shape: Sequence[int]) -> NDArray[np.float32]:
    """(P, C) maps on the grid, enlarged bicubically to (H, W, C); values stay within those of the maps."""
    _check_grid(maps, grid)
    values = maps.detach().float().cpu().T.reshape(1, -1, *grid)
    if tuple(shape[:2]) != grid:
        enlarged = torch.nn.functional.interpolate(values, size=tuple(shape[:2]), mode="bicubic", align_corners=False)
        low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
        values = torch.minimum(torch.maximum(enlarged, low), high)  # cubic curves overshoot at edges
    return values[0].permute(1, 2, 0).numpy()


def _by_area(shares: NDArray[np.float64], peaks: NDArray[np.float32]) -> list[int]:
    return sorted(range(len(shares)), key=lambda token: (-shares[token], -peaks[token], token))


def _grey(image: Pixels) -> NDArray[np.float32]:
    """(H, W, 1) luma."""
    return (image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def _uint8(values: NDArray) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text on one line, cut with an ellipsis to the width in pixels."""
    text = printable(text)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
