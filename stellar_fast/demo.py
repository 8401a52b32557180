"""`stellar-fast demo`: a tiny STELLAR learns on real photos in minutes, and shows what it sees in photos held out.

The photos come inside scikit-image and scikit-learn (extra: photos).
"""

import io
import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from stellar_fast.commands.console import console, tell
from stellar_fast.data import MultiViewTransform
from stellar_fast.data.transform import centre_square, random_box
from stellar_fast.files import MARK, TEMPORARY, check_writable, is_ours, lock_folder, shown, write_atomically
from stellar_fast.models import StellarModel
from stellar_fast.ops.crop_resize import crop_resize
from stellar_fast.train import RichProgress, TrainConfig, TrainResult, train
from stellar_fast.train.build import build_model
from stellar_fast.visualize import Pixels, grid_figure, psnr, save_image, save_panel, to_pixels, token_shares

CROPS_PER_PHOTO = 32
CROP_SIDE = 160  # pixels of a crop's short side: twice what the views need, and quick to decode
STEPS = 480  # 100 s on two fast cores; a slower machine is ended by the clock, with its learning rate at zero by then
WIN_SHARE = 0.02
MARKER = ".stellar_fast_demo"
_WRITTEN = re.compile(
    rf"{re.escape(MARKER)}|loss_curve\.png|reconstructions\.png|tokens/\w+\.png|photos/\w+/\d\d\.jpg"
    rf"|weights/(config\.json|model\.safetensors|README\.md)|run/(config\.yaml|metrics\.jsonl|checkpoints/.*|\.lock)"
    rf"|(.*/)?{re.escape(TEMPORARY)}.*",
    re.DOTALL,
)
FINE_SIDE = 256  # pixels; pictures are drawn at this size too


@dataclass(frozen=True)
class Result:
    """What one model makes of the held-out photos. N photos."""

    psnr: list[float]  # dB, of each reconstruction
    losses: dict[str, float]
    token_entropy: float  # nats
    tokens_winning: list[int]  # tokens that win 2 % of a photo's patches or more
    tokens_winning_overall: int  # likewise of all photos' patches together
    peak: float  # mean over tokens of the largest share of a patch
    signal: int | None = None  # the number of the one that ended the training early


def demo(out: Path, seconds: int = 150, seed: int = 0) -> Result:
    """Train the tiny preset, write pictures and weights to `out`, and print a table.

    Args:
        out: folder for loss_curve.png, reconstructions.png, tokens/*.png, weights/, run/ and photos/. An earlier
            demo's is replaced.
        seconds: longest time to train.
        seed: of weights, crops, views and masks.

    Returns:
        The result of the trained model.

    Raises:
        ValueError: less than a second, a folder that holds something else, or one where nothing can be written.
    """
    if seconds < 1:
        raise ValueError(f"seconds must be at least 1 but is {seconds}")
    check_writable(out)
    out = Path(os.path.realpath(out))
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        train_photos, held_out = bundled_photos()
        _make_room(out)
        return _run(out, train_photos, held_out, seconds, seed)


def _run(out: Path, train_photos: dict[str, Pixels], held_out: dict[str, Pixels], seconds: int, seed: int) -> Result:
    write_crops(train_photos, out / "photos", seed)
    tell(
        f"{len(train_photos)} photos to learn from ({', '.join(train_photos)}), "
        f"{len(held_out)} held out ({', '.join(held_out)})"
    )
    config = TrainConfig(
        data=str(out / "photos"),
        out=str(out / "run"),
        preset="tiny",
        seed=seed,
        steps=STEPS,
        max_seconds=seconds,
        batch_size=16,
        lr=1.5e-3,
        beta2=0.95,
        log_every=1,
        save_every=0,
    )
    torch.manual_seed(seed)
    model = build_model(config)
    before = evaluate(model, held_out, seed)
    result = train(config, loggers=[RichProgress(console, every=50)], model=model)
    after = evaluate(model, held_out, seed)
    model.save_pretrained(out / "weights")
    draw(model, result, held_out, out)
    console.print(closing_table(before, after, result, held_out))
    tell(f"pictures and weights are in {shown(out)}: loss_curve.png, reconstructions.png, tokens/, weights/")
    return replace(after, signal=result.signal)


def bundled_photos() -> tuple[dict[str, Pixels], dict[str, Pixels]]:
    """Photos to train on and photos held out, (H, W, 3) uint8 by name.

    Raises:
        ValueError: the packages with the photos are not installed.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError(f"the demo's photos are an extra: pip install 'stellar-fast[photos]' ({error})") from error
    china, flower = load_sample_images().images
    motorcycle = data.stereo_motorcycle()[0]
    train_photos = {
        "astronaut": data.astronaut(),
        "china": china,
        "hubble": data.hubble_deep_field(),
        "immunohistochemistry": data.immunohistochemistry(),
        "motorcycle": motorcycle,
        "retina": data.retina(),
        "rocket": data.rocket(),
    }
    return train_photos, {"chelsea": data.chelsea(), "coffee": data.coffee(), "flower": flower}


def write_crops(photos: dict[str, Pixels], folder: Path, seed: int) -> None:
    """Cut each photo into crops of many scales: a handful of photos becomes a few hundred training images."""
    draw = random.Random(seed)
    for name, pixels in photos.items():
        for i in range(CROPS_PER_PHOTO):
            top, left, height, width = random_box(pixels.shape[0], pixels.shape[1], (0.08, 1.0), draw)
            crop = Image.fromarray(pixels[top : top + height, left : left + width])
            scale = CROP_SIDE / min(height, width)
            crop = crop.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            crop.save(buffer, format="JPEG", quality=92)
            write_atomically(folder / name / f"{i:02}.jpg", buffer.getvalue())


def squares(photos: dict[str, Pixels], side: int) -> Tensor:
    """The central square of each photo, (N, 3, side, side) uint8."""
    crops = []
    for pixels in photos.values():
        crops.append(crop_resize(pixels, [centre_square(*pixels.shape[:2])], [False], side))
    return torch.cat(crops)


@torch.no_grad()
def evaluate(model: StellarModel, photos: dict[str, Pixels], seed: int) -> Result:
    """Measure a model on photos; losses on four draws of views of each, the same draws for every model."""
    was_training = model.training
    model.eval()
    side = model.encoder.config.image_size
    images = squares(photos, side)
    features = model.encode(images)
    reconstructions = model.reconstruct(features)["reconstruction"]
    transform = MultiViewTransform(side, model.local_size, model.num_masks, model.num_local_crops)
    views = [transform(pixels, seed + i) for pixels in photos.values() for i in range(4)]
    batch = {name: torch.stack([view[name] for view in views]) for name in views[0]}
    predictions = model(batch, generator=torch.Generator().manual_seed(seed))["predictions"]
    total, parts = model.loss(predictions)
    model.train(was_training)
    return Result(
        psnr=[psnr(to_pixels(a), to_pixels(b)) for a, b in zip(images, reconstructions, strict=True)],
        losses={"total": total.item(), **{name: value.item() for name, value in parts.items()}},
        token_entropy=predictions["metrics"]["token_entropy"].item(),
        tokens_winning=[int((token_shares(spatial) >= WIN_SHARE).sum()) for spatial in features["spatial"]],
        tokens_winning_overall=int((token_shares(features["spatial"].flatten(0, 1)) >= WIN_SHARE).sum()),
        peak=features["peak_dist"].mean().item(),
    )


def mean_colour_psnr(photos: dict[str, Pixels], side: int) -> list[float]:
    """PSNR of each photo against its own mean colour: what one knows of a photo without looking at its places."""
    images = squares(photos, side).float() / 255
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    return [psnr(to_pixels(a), to_pixels(b)) for a, b in zip(images, flat, strict=True)]


@torch.no_grad()
def draw(model: StellarModel, result: TrainResult, photos: dict[str, Pixels], out: Path) -> None:
    """Write loss_curve.png, reconstructions.png, and a panel of token maps for each photo."""
    model.eval()
    if result.history:  # a signal may have come before the first step
        loss_curve(result, out / "loss_curve.png")
    tokens, side = model.encoder.num_sparse_tokens, model.encoder.config.image_size
    rows = []
    # positions resize and tokens do not care: the model also works on a finer grid than it was trained on
    for size in (side, FINE_SIDE):
        images = squares(photos, size)
        features = model.encode(images)
        reconstructions = model.reconstruct(features)["reconstruction"]
        pairs = [(to_pixels(a), to_pixels(b)) for a, b in zip(images, reconstructions, strict=True)]
        rows.append(
            [
                (rebuilt, f"from {tokens} tokens at {size} px · {psnr(photo, rebuilt):.1f} dB")
                for photo, rebuilt in pairs
            ]
        )
    originals = [(photo, f"{name}, held out") for name, (photo, _) in zip(photos, pairs, strict=True)]
    title = f"{tokens} sparse tokens an image, after {result.seconds:.0f} s of training"
    save_image(out / "reconstructions.png", grid_figure([originals, *rows], title=title))
    for i, (name, (photo, rebuilt)) in enumerate(zip(photos, pairs, strict=True)):
        save_panel(
            out / "tokens" / f"{name}.png",
            photo,
            features["spatial"][i],
            features["dense"][i],
            model.encoder.grid(images),
            title=f"{name}, held out",
            reconstruction=rebuilt,
        )


def loss_curve(result: TrainResult, path: Path) -> None:
    """Every loss over the steps, one small plot each."""
    from matplotlib.figure import Figure

    names = [name for name in result.history[0] if name in ("loss", "MSE") or name.endswith("_loss")]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    axes = figure.subplots(2, -(-len(names) // 2), squeeze=False).flatten()
    steps = [record["step"] for record in result.history]
    for axis, name in zip(axes, names, strict=False):
        values = np.array([record[name] for record in result.history])
        half = len(values) // 50
        smooth = np.convolve(np.pad(values, half, mode="edge"), np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
        axis.plot(steps, values, color="#b9c4d8", linewidth=0.8)
        axis.plot(steps, smooth, color="#2456a6", linewidth=1.8)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if values.min() > 0 and values.max() > 20 * values.min():
            axis.set_yscale("log")
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    save_image(path, Image.open(buffer))


def closing_table(before: Result, after: Result, result: TrainResult, photos: dict[str, Pixels]) -> Table:
    """Before and after, on the held-out photos."""
    side = result.model.encoder.config.image_size
    table = Table(
        "held-out photos", "before", "after", title=f"{result.images_per_second:.1f} images/s, {result.step} steps"
    )
    for name, low, high, flat in zip(photos, before.psnr, after.psnr, mean_colour_psnr(photos, side), strict=True):
        table.add_row(f"PSNR {name} (mean colour {flat:.1f} dB)", f"{low:.1f} dB", f"{high:.1f} dB")
    for name, value in before.losses.items():
        table.add_row(name, f"{value:.4g}", f"{after.losses[name]:.4g}")
    table.add_row("token entropy (log K is even)", f"{before.token_entropy:.2f}", f"{after.token_entropy:.2f}")
    tokens = result.model.encoder.num_sparse_tokens
    counts = [" ".join(f"{n}/{tokens}" for n in r.tokens_winning) for r in (before, after)]
    table.add_row("tokens that win 2 % of a photo", *counts)
    overall = [f"{r.tokens_winning_overall}/{tokens}" for r in (before, after)]
    table.add_row("tokens that win 2 % of all photos", *overall)
    return table


def _make_room(out: Path) -> None:
    """Remove what an earlier demo, which its marker file tells, wrote there; a folder that holds more is refused."""
    folders, files = [], []
    for folder, inner, names in os.walk(out):
        links = [name for name in inner if Path(folder, name).is_symlink()]
        folders += [Path(folder, name) for name in inner]
        files += [Path(folder, name) for name in (*names, *links)]
    marker = out / MARKER
    ours = marker.is_file() and is_ours(marker)
    for path in files:
        if not ours or path.is_symlink() or not _WRITTEN.fullmatch(path.relative_to(out).as_posix()):
            raise ValueError(f"{shown(out)} holds {shown(path)}, which no demo wrote: name another --out")
    for path in files:
        if path != marker:  # it goes last, so that this can be done again where it is interrupted
            path.unlink()
    for path in reversed(folders):
        path.rmdir()
    write_atomically(marker, f"{MARK}: the next demo takes the place of what is here.\n".encode())
