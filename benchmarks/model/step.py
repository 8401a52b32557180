"""One training step with the pixel head: forward, backward, clip, AdamW. No data loading, colour or EMA."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.model.pair import (
    Case,
    autocast,
    build_plain,
    build_stellar_fast,
    compare,
    random_images,
    random_keep_indices,
)
from benchmarks.plain import PlainStellar
from benchmarks.shapes import ModelShape, step_bytes, step_flops

CLIP_NORM = 3.0
LOSSES = ("MSE", "clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss", "koleo_loss")

# forward to the predictions and the total loss, under the case's autocast
Forward = Callable[[nn.Module, torch.dtype], tuple[dict[str, Tensor], Tensor]]


def build_case(shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]) -> Case:
    """Build the providers, verify losses, image and every gradient against fp32 plain, and return what to time."""
    plain = build_plain(shape, device).train()
    models: dict[str, nn.Module] = {"plain": plain}
    if "plain_compiled" in providers:
        models["plain_compiled"] = build_plain(shape, device).train()
        models["plain_compiled"].compile()
    if "stellar_fast" in providers:
        models["stellar_fast"] = build_stellar_fast(shape, plain).train()
    forward = step_forward(shape, batch, device)
    results = {name: lambda model=model: losses_and_gradients(model, forward, dtype) for name, model in models.items()}
    checks = compare(results, lambda: losses_and_gradients(plain, forward, torch.float32), dtype)
    return Case(
        suite="step",
        shape=shape.describe(batch, step=True),
        batch=batch,
        flops=step_flops(shape, batch),
        bytes=step_bytes(sum(p.numel() for p in trained_parameters(plain))),
        calls={name: training_step(model, forward, dtype) for name, model in models.items()},
        checks=checks,
        direction="forward+backward",
        preset=shape.preset,
    )


def step_forward(shape: ModelShape, batch: int, device: torch.device) -> Forward:
    """Predictions and total loss of a model, on the same views at every call."""
    inputs = {
        "global_views": random_images(batch * shape.num_masks, shape.image_size, device, seed=1),
        "local_views": random_images(batch * shape.num_local_crops, shape.local_size, device, seed=2),
    }
    inputs = {name: images.unflatten(0, (batch, -1)) for name, images in inputs.items()}
    keep = random_keep_indices(batch * shape.num_masks, shape, device, seed=3)

    def forward(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        with autocast(device, dtype):
            if isinstance(model, PlainStellar):
                predictions = model(inputs, keep)
                return predictions, model.loss(predictions)
            predictions = model(inputs, mode="train", keep_indices=keep)["predictions"]
            return predictions, model.loss(predictions)[0]

    return forward


def training_step(model: nn.Module, forward: Forward, dtype: torch.dtype) -> Callable[[], None]:
    """The call that is timed: AdamW with the same settings on every side, each as its own trainer has it.

    Plain has torch's default, as upstream; this package's trainer has the fused one.
    """
    parameters = trained_parameters(model)
    fused = None if isinstance(model, PlainStellar) else True
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-4, weight_decay=0.04, fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _, loss = forward(model, dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()

    return step


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a step changes. The plain model carries some that never touch the loss, for their names."""
    unused = ("pooler.", "decoder.embeddings.")
    return [p for name, p in model.named_parameters() if p.requires_grad and not any(u in name for u in unused)]


def losses_and_gradients(model: nn.Module, forward: Forward, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses, total, image and gradients by upstream's names, from one backward pass."""
    model.zero_grad(set_to_none=True)
    predictions, total = forward(model, dtype)
    total.backward()
    if isinstance(model, PlainStellar):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    else:
        gradients = model.upstream_gradients()
    found = {name: predictions[name].detach() for name in (*LOSSES, "x_hat")}
    found |= {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    model.zero_grad(set_to_none=True)
    return found | {"total": total.detach()}
