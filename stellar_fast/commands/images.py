"""`stellar-fast encode`, `reconstruct` and `visualize`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stellar_fast.commands import outputs
from stellar_fast.commands.console import console, say, tell, text
from stellar_fast.commands.inputs import batches, find, load, load_full, relative_name
from stellar_fast.commands.work import Work, keeping
from stellar_fast.files import check_output, is_of_full_disk, mark, null_if_not_finite, shown, write_atomically

if TYPE_CHECKING:
    import torch

    from stellar_fast import StellarEncoder, StellarModel, StellarOutput
    from stellar_fast.fidelity import Fidelity

Images = Annotated[str, typer.Option(help="Folder of images (nested folders included), or one image.")]
Weights = Annotated[
    str,
    typer.Option(help="Folder with config.json and safetensors, a training checkpoint, a weights file or a hub id."),
]
Model = Annotated[str, typer.Option(help="Which model, where the weights hold several or name none: b16, l16, h16.")]
VQModel = Annotated[str, typer.Option(help="MaskGIT-VQGAN weights, for models that reconstruct through its codes.")]
Size = Annotated[int, typer.Option(help="Side of the square crop in pixels; 0: the model's.")]
Batch = Annotated[int, typer.Option(help="Images in one pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Skip = Annotated[int, typer.Option(help="Leave out so many images at the beginning.")]
Limit = Annotated[int, typer.Option(help="Stop after so many images; 0: all.")]
ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LO HI", help="Numbers in the files that are black and white; not given: found for each (docs/data.md)."
    ),
]
MaxPixels = Annotated[int, typer.Option(help="Pixels that an image may have; 0: what Pillow allows.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that this program did not write, too.")]


def encode(
    context: typer.Context,
    images: Images,
    weights: Weights,
    out: Annotated[str, typer.Option(help="File to write: sparse, spatial, cls; file names as JSON in its metadata.")],
    model: Model = "",
    size: Size = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    skip: Skip = 0,
    limit: Limit = 0,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = 0,
    overwrite: Overwrite = False,
) -> None:
    """Encode images to one safetensors file.

    Holds sparse (N, K, D), spatial (N, P, K) and cls (N, 1, D), float32, and the metadata `names`.

    Ctrl-C writes what is done, and prints the line that goes on.

    Example: [cyan]stellar-fast encode --images photos --weights runs/first --out features.safetensors[/]
    """
    paths = find(images, skip, limit)
    names = [relative_name(path, images) for path in paths]
    outputs.check_names(names)

    def target() -> Path:
        inputs = chain(paths, outputs.weights_files(weights))
        return check_output(out, kind=outputs.FEATURES, overwrite=overwrite, inputs=inputs)

    features = outputs.Features(len(paths), target().parent)
    encoder = load(weights, model, device)

    def write(work: Work) -> OSError | None:
        place, reason = out, ""
        try:
            file = target()
        except ValueError as error:  # somebody took the name meanwhile
            reason = str(error)
        else:
            if work.done < len(names) and file.exists():
                reason = f"{shown(out)} holds earlier features, which a part does not replace"
        if reason:
            place = f"{out}.{os.getpid()}"
            file = Path(place)
            say("[yellow]warning:[/]", f"{reason}; the features go to {shown(place)}")
        about = {"weights": shown(weights), "images": f"{work.done} of {len(names)}"}
        try:
            features.write(file, about)
        except OSError as error:
            if not is_of_full_disk(error) or not features.cut_to_room():
                raise
            work.back_to(features.names[-1])
            write(work)
            return error
        tell(f"{len(features.names)} images in {shown(place)}")
        return None

    with keeping(context, names, write) as work:
        for found, batch in batches(
            paths, images, size or encoder.config.image_size, batch_size, work, value_range, max_pixels
        ):
            features.add(found, _features(encoder, found, batch))
            work.finished(found[-1])


def reconstruct(
    context: typer.Context,
    images: Images,
    weights: Weights,
    out: Annotated[str, typer.Option(help="Folder for the pictures and metrics.json.")],
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens/--no-tokens",
            help="Show the reconstruction without each token too; otherwise original, reconstruction and error map "
            "alone, pixel for pixel, which is faster.",
        ),
    ] = True,
    model: Model = "",
    vq_model: VQModel = "",
    size: Size = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    skip: Skip = 0,
    limit: Limit = 0,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = 0,
    overwrite: Overwrite = False,
) -> None:
    """Reconstruct images from their sparse tokens, show where that errs and what each token adds, and measure it.

    The picture of photo.jpg is photo.jpg.png. metrics.json holds PSNR and SSIM, the means and those of every image, and
    the PSNR without each token.

    Ctrl-C measures what is done, and prints the line that goes on.

    Example: [cyan]stellar-fast reconstruct --images photos --weights runs/first --out reconstructions[/]
    """
    import numpy as np

    from stellar_fast.fidelity import error_map, fidelity, fidelity_panel
    from stellar_fast.visualize import save_image, to_pixels

    paths = find(images, skip, limit)
    names = [relative_name(path, images) for path in paths]
    targets = outputs.pictures(paths, names, images, out, outputs.RECONSTRUCTION, overwrite)
    record = check_output(Path(out, outputs.RECORD), kind=outputs.FIDELITY, overwrite=overwrite, inputs=paths)
    stellar = load_full(weights, model, vq_model, device)
    found: dict[str, Fidelity] = {}

    def write(work: Work) -> None:
        place = record
        if work.done < len(names) and record.exists():
            place = record.with_name(f"{record.name}.{os.getpid()}")
            said = f"{shown(record)} holds earlier measurements, which a part does not replace"
            say("[yellow]warning:[/]", f"{said}; these go to {shown(place)}")
        _write_fidelity(place, weights, found, len(names))
        tell(f"{len(found)} pictures in {shown(out)}")

    with outputs.hold(out), keeping(context, names, write) as work:
        for some, batch in batches(
            paths, images, size or stellar.encoder.config.image_size, batch_size, work, value_range, max_pixels
        ):
            batch = _whole_patches(stellar.encoder, batch)
            features = _features(stellar.encoder, some, batch)
            for i, (name, result) in enumerate(zip(some, _decode(stellar, some, features, features.grid), strict=True)):
                original, rebuilt = to_pixels(_fit(batch[i], result)), to_pixels(result)
                parts = _without_each(stellar, name, features, i, batch_size) if tokens else ()
                without = [to_pixels(part) for part in parts]
                measured = fidelity(original, rebuilt, without)
                picture: Any = np.concatenate((original, rebuilt, error_map(original, rebuilt)), axis=1)
                if tokens:
                    picture = fidelity_panel(original, rebuilt, without, measured, title=shown(name))
                save_image(targets[name], picture, kind=outputs.RECONSTRUCTION, overwrite=overwrite)
                found[name] = measured
                work.finished(name)
                if work.stopping:
                    break


def visualize(
    context: typer.Context,
    images: Images,
    weights: Weights,
    out: Annotated[str, typer.Option(help="Folder for the pictures, one PNG for each image.")],
    model: Model = "",
    reconstruction: Annotated[bool, typer.Option("--reconstruction", help="Show the reconstruction too.")] = False,
    vq_model: VQModel = "",
    size: Size = 0,
    batch_size: Batch = 8,
    device: Device = "auto",
    skip: Skip = 0,
    limit: Limit = 0,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw what each token looks at: maps over the photo, hard segmentation, principal components.

    The picture of photo.jpg is photo.jpg.png. Ctrl-C prints the line that goes on.

    Example: [cyan]stellar-fast visualize --images photos --weights runs/first --out pictures[/]
    """
    from stellar_fast.visualize import save_panel, to_pixels

    paths = find(images, skip, limit)
    names = [relative_name(path, images) for path in paths]
    targets = outputs.pictures(paths, names, images, out, outputs.TOKENS, overwrite)
    stellar = load_full(weights, model, vq_model, device) if reconstruction else None
    encoder = stellar.encoder if stellar else load(weights, model, device)
    drawn: list[str] = []

    def write(work: Work) -> None:
        tell(f"{len(drawn)} pictures in {shown(out)}")

    with outputs.hold(out), keeping(context, names, write, rest_elsewhere=False) as work:
        for some, batch in batches(
            paths, images, size or encoder.config.image_size, batch_size, work, value_range, max_pixels
        ):
            batch = _whole_patches(encoder, batch)
            features = _features(encoder, some, batch)
            results = _decode(stellar, some, features, features.grid) if stellar else batch
            for i, name in enumerate(some):
                save_panel(
                    targets[name],
                    to_pixels(batch[i]),
                    features["spatial"][i],
                    features["dense"][i],
                    encoder.grid(batch),
                    title=shown(name),
                    reconstruction=to_pixels(results[i]) if stellar else None,
                    kind=outputs.TOKENS,
                    overwrite=overwrite,
                )
                drawn.append(name)
                work.finished(name)
                if work.stopping:
                    break


def _write_fidelity(path: Path, weights: str, found: Mapping[str, Fidelity], of: int) -> None:
    """Write the record, then print it; `of` so many images."""
    mean = {name: sum(getattr(values, name) for values in found.values()) / len(found) for name in ("psnr_db", "ssim")}
    record = {
        "about": mark(outputs.FIDELITY),
        "weights": weights,
        "of": of,
        "mean": mean,
        "images": [{"name": name, **asdict(values)} for name, values in found.items()],
    }
    write_atomically(path, json.dumps(null_if_not_finite(record), indent=1).encode())
    table = Table("image", "PSNR (dB)", "SSIM")
    for name, values in found.items():
        table.add_row(text(shown(name)), f"{values.psnr_db:.2f}", f"{values.ssim:.4f}")
    console.print(table)
    tell(f"mean PSNR {mean['psnr_db']:.2f} dB, SSIM {mean['ssim']:.4f}")


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _whole_patches(encoder: StellarEncoder, images: torch.Tensor) -> torch.Tensor:
    """What the encoder sees: the remainder at the right and bottom that fills no patch is cut off."""
    patch, (height, width) = encoder.config.patch_size, encoder.grid(images)
    return images[..., : height * patch, : width * patch] if height and width else images


def _features(encoder: StellarEncoder, names: list[str], images: torch.Tensor) -> Any:
    """Of images of these names. Raises ValueError where they are not finite."""
    import torch

    device = _device(encoder)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        features = encoder(images.to(device))
    _check_finite("the features", names, *(features[name] for name in ("sparse", "spatial", "cls", "dense")))
    return features


def _decode(model: StellarModel, names: list[str], features: Any, grid: tuple[int, int]) -> torch.Tensor:
    """Of images of these names. Raises ValueError where the pictures are not finite."""
    import torch

    device = _device(model)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        pictures = model.reconstruct(features, grid=grid)["reconstruction"].float().cpu()
    _check_finite("the reconstructions", names, pictures)
    return pictures


def _check_finite(what: str, names: list[str], *tensors: torch.Tensor) -> None:
    good = [all(parts) for parts in zip(*(x.isfinite().flatten(1).all(1).tolist() for x in tensors), strict=True)]
    bad = list(dict.fromkeys(name for name, is_good in zip(names, good, strict=True) if not is_good))
    if bad:
        listed = ", ".join(map(shown, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"{what} of {len(bad)} of {len(set(names))} images at hand are not finite: {listed}")


def _without_each(model: StellarModel, name: str, features: StellarOutput, image: int, at_once: int) -> torch.Tensor:
    """(K, 3, H, W): one image without token 0, 1, ..., decoded `at_once` or fewer in a pass."""
    import torch

    from stellar_fast import drop_tokens

    latent = [features[part][image] for part in ("sparse", "spatial")]
    results = []
    for dropped in torch.eye(features.sparse.shape[1], dtype=torch.bool).split(at_once):
        sparse, spatial = (part.expand(len(dropped), -1, -1) for part in latent)
        edited = drop_tokens({"sparse": sparse, "spatial": spatial}, dropped)
        results.append(_decode(model, [name] * len(dropped), edited, features.grid))
    return torch.cat(results)


def _fit(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The (3, H, W) uint8 image in [0, 1], resized to the other's size where a VQGAN works at its own."""
    import torch

    image = image.float() / 255
    if image.shape == other.shape:
        return image
    return torch.nn.functional.interpolate(image[None], other.shape[-2:], mode="bicubic", antialias=True)[0].clamp(0, 1)
