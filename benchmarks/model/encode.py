"""Encode a batch of images: all features of `encode`, no gradients."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.model.pair import Case, autocast, build_plain, build_stellar_fast, compare, random_images
from benchmarks.shapes import ModelShape, encode_bytes, encode_flops

# what both sides return; the plain side also carries two derived views of the same tensors
FEATURES = ("cls", "dense", "sparse", "spatial", "lowrank")


def build_case(shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]) -> Case:
    """Build the providers, verify their features against fp32 plain, and return what to time."""
    plain = build_plain(shape, device).eval()
    models: dict[str, nn.Module] = {"plain": plain}
    if "plain_compiled" in providers:
        models["plain_compiled"] = build_plain(shape, device).eval()
        models["plain_compiled"].encode = torch.compile(models["plain_compiled"].encode)
    if "stellar_fast" in providers:
        models["stellar_fast"] = build_stellar_fast(shape, plain).eval()
    results = {name: encode_call(model, shape, batch, dtype, device) for name, model in models.items()}
    encoder_parameters = sum(p.numel() for p in plain.encoder.encoder.parameters())
    return Case(
        suite="encode",
        shape=shape.describe(batch, step=False),
        batch=batch,
        flops=encode_flops(shape, batch),
        bytes=encode_bytes(encoder_parameters, batch, shape),
        calls=dict(results),
        checks=compare(results, encode_call(plain, shape, batch, torch.float32, device), dtype),
        preset=shape.preset,
    )


def encode_call(
    model: nn.Module, shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], dict[str, torch.Tensor]]:
    """Encodes the same images at every call."""
    images = random_images(batch, shape.image_size, device, seed=1)

    def encode() -> dict[str, torch.Tensor]:
        with autocast(device, dtype):
            features = model.encode(images)
        return {name: features[name] for name in FEATURES}

    return encode
