"""`stellar-fast encode`, `reconstruct` and `visualize`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from stellar_fast.commands.console import console
from stellar_fast.commands.inputs import batches, find, load, load_full, pictures
from stellar_fast.files import null_if_not_finite, write_atomically

if TYPE_CHECKING:
    import torch

    from stellar_fast import StellarEncoder, StellarModel, StellarOutput

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
Limit = Annotated[int, typer.Option(help="Stop after so many images; 0: all.")]


def encode(
    images: Images,
    weights: Weights,
    out: Annotated[str, typer.Option(help="File to write: sparse, spatial, cls; file names as JSON in its metadata.")],
    model: Model = "",
    size: Size = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    limit: Limit = 0,
) -> None:
    """Encode images to one safetensors file.

    Holds sparse (N, K, D), spatial (N, P, K) and cls (N, 1, D), float32, and the metadata `names`.

    Example: [cyan]stellar-fast encode --images photos --weights runs/first --out features.safetensors[/]
    """
    import torch
    from safetensors.torch import save

    target = Path(out)
    if target.is_dir():
        raise ValueError(f"out {out} is a folder: name a file in it")
    paths = find(images, limit)
    encoder = load(weights, model, device)
    names: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {"sparse": [], "spatial": [], "cls": []}
    for batch_names, batch in batches(paths, images, size or encoder.config.image_size, batch_size):
        features = _features(encoder, batch)
        names += batch_names
        for name, tensors in parts.items():
            tensors.append(features[name].float().cpu())
    metadata = {"names": json.dumps(names), "weights": weights}
    write_atomically(target, save({name: torch.cat(tensors) for name, tensors in parts.items()}, metadata))
    console.print(f"{len(names)} images in {target}", soft_wrap=True, highlight=False)


def reconstruct(
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
    limit: Limit = 0,
) -> None:
    """Reconstruct images from their sparse tokens, show where that errs and what each token adds, and measure it.

    metrics.json holds PSNR and SSIM, the means and those of every image, and the PSNR without each token.

    Example: [cyan]stellar-fast reconstruct --images photos --weights runs/first --out reconstructions[/]
    """
    import numpy as np

    from stellar_fast.fidelity import Fidelity, error_map, fidelity, fidelity_panel
    from stellar_fast.visualize import save_image, to_pixels

    paths = find(images, limit)
    targets = pictures(paths, images, out)
    stellar = load_full(weights, model, vq_model, device)
    found: dict[str, Fidelity] = {}
    for names, batch in batches(paths, images, size or stellar.encoder.config.image_size, batch_size):
        batch = _whole_patches(stellar.encoder, batch)
        features = _features(stellar.encoder, batch)
        for i, (name, result) in enumerate(zip(names, _decode(stellar, features, features.grid), strict=True)):
            original, rebuilt = to_pixels(_fit(batch[i], result)), to_pixels(result)
            without = [to_pixels(x) for x in _without_each(stellar, features, i, batch_size)] if tokens else []
            found[name] = fidelity(original, rebuilt, without)
            if tokens:
                save_image(targets[name], fidelity_panel(original, rebuilt, without, found[name], title=name))
            else:
                strip = (original, rebuilt, error_map(original, rebuilt))
                save_image(targets[name], np.concatenate(strip, axis=1))
    table = Table("image", "PSNR (dB)", "SSIM")
    for name, values in found.items():
        table.add_row(escape(name), f"{values.psnr_db:.2f}", f"{values.ssim:.4f}")
    console.print(table)
    psnr_db = sum(values.psnr_db for values in found.values()) / len(found)
    ssim = sum(values.ssim for values in found.values()) / len(found)
    record = {
        "weights": weights,
        "mean": {"psnr_db": psnr_db, "ssim": ssim},
        "images": [{"name": name, **asdict(values)} for name, values in found.items()],
    }
    text = json.dumps(null_if_not_finite(record), indent=1)
    write_atomically(Path(out) / "metrics.json", text.encode())
    console.print(f"mean PSNR {psnr_db:.2f} dB, SSIM {ssim:.4f}, {len(found)} pictures in {out}", soft_wrap=True)


def visualize(
    images: Images,
    weights: Weights,
    out: Annotated[str, typer.Option(help="Folder for the pictures, one PNG for each image.")],
    model: Model = "",
    reconstruction: Annotated[bool, typer.Option("--reconstruction", help="Show the reconstruction too.")] = False,
    vq_model: VQModel = "",
    size: Size = 0,
    batch_size: Batch = 8,
    device: Device = "auto",
    limit: Limit = 0,
) -> None:
    """Draw what each token looks at: maps over the photo, hard segmentation, principal components.

    Example: [cyan]stellar-fast visualize --images photos --weights runs/first --out pictures[/]
    """
    from stellar_fast.visualize import save_panel, to_pixels

    paths = find(images, limit)
    targets = pictures(paths, images, out)
    stellar = load_full(weights, model, vq_model, device) if reconstruction else None
    encoder = stellar.encoder if stellar else load(weights, model, device)
    count = 0
    for names, batch in batches(paths, images, size or encoder.config.image_size, batch_size):
        batch = _whole_patches(encoder, batch)
        features = _features(encoder, batch)
        results = _decode(stellar, features, features.grid) if stellar else batch
        for i, name in enumerate(names):
            save_panel(
                targets[name],
                to_pixels(batch[i]),
                features["spatial"][i],
                features["dense"][i],
                encoder.grid(batch),
                title=name,
                reconstruction=to_pixels(results[i]) if stellar else None,
            )
        count += len(names)
    console.print(f"{count} pictures in {out}", soft_wrap=True, highlight=False)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _whole_patches(encoder: StellarEncoder, images: torch.Tensor) -> torch.Tensor:
    """What the encoder sees: the remainder at the right and bottom that fills no patch is cut off."""
    patch, (height, width) = encoder.config.patch_size, encoder.grid(images)
    return images[..., : height * patch, : width * patch] if height and width else images


def _features(encoder: StellarEncoder, images: torch.Tensor) -> Any:
    import torch

    device = _device(encoder)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        return encoder(images.to(device))


def _decode(model: StellarModel, features: Any, grid: tuple[int, int]) -> torch.Tensor:
    import torch

    device = _device(model)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        return model.reconstruct(features, grid=grid)["reconstruction"].float().cpu()


def _without_each(model: StellarModel, features: StellarOutput, image: int, at_once: int) -> torch.Tensor:
    """(K, 3, H, W): one image without token 0, 1, ..., decoded `at_once` or fewer in a pass."""
    import torch

    from stellar_fast import drop_tokens

    latent = [features[name][image] for name in ("sparse", "spatial")]
    results = []
    for dropped in torch.eye(features.sparse.shape[1], dtype=torch.bool).split(at_once):
        sparse, spatial = (part.expand(len(dropped), -1, -1) for part in latent)
        edited = drop_tokens({"sparse": sparse, "spatial": spatial}, dropped)
        results.append(_decode(model, edited, features.grid))
    return torch.cat(results)


def _fit(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The (3, H, W) uint8 image in [0, 1], resized to the other's size where a VQGAN works at its own."""
    import torch

    image = image.float() / 255
    if image.shape == other.shape:
        return image
    return torch.nn.functional.interpolate(image[None], other.shape[-2:], mode="bicubic", antialias=True)[0].clamp(0, 1)
