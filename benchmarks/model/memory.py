"""Peak memory of the prototype loss at the sizes of a large batch, forward and backward.

Each provider runs in a process of its own, which also gives its loss: a peak counts for nothing where the losses part.
What counts is beyond the gradients and the inputs, among them the clean view's logits, or plain's assignments.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DTYPES, Ceilings, peak_extra_mib
from benchmarks.plain.objectives import sinkhorn, soft_cross_entropy
from benchmarks.results import Row
from benchmarks.shapes import ModelShape, model_shape

BATCH = 128  # images
PROVIDERS = ("plain", "stellar_fast")
TEMPERATURE, SINKHORN_TEMPERATURE = 0.12, 0.06
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative


def sizes(shape: ModelShape, batch: int) -> tuple[int, int]:
    """(predictions, targets): tokens of the masked views and of the clean one."""
    targets = batch * shape.num_sparse_tokens
    return targets * shape.num_masks, targets


def extra_mib(provider: str, preset: str, batch: int, dtype: str, device: str) -> tuple[float, float]:
    """(The peak in MiB, the loss) of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.model.memory", provider, preset, str(batch), dtype, device]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    peak, loss = run.stdout.split()[-2:]
    return float(peak), float(loss)


def disagreement(loss: float, plain_loss: float, dtype: str) -> float:
    """Relative difference of a loss from plain's as a share of what is allowed: not below 1 is wrong, NaN too."""
    return abs(loss - plain_loss) / abs(plain_loss) / LOSS_TOLERANCE[dtype]


def rows(
    preset: str,
    batch: int | None,
    dtypes: Sequence[str],
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    say: Callable[[str], object],
) -> tuple[list[Row], int]:
    """Rows without times, and how many providers were wrong: their loss is not plain's."""
    shape, batch = model_shape(preset), batch or BATCH
    R, T = sizes(shape, batch)
    found, wrong = [], 0
    for dtype in dtypes:
        peaks, losses = {}, {}
        for provider in PROVIDERS:
            say(f"memory {dtype}: {provider}")
            peaks[provider], losses[provider] = extra_mib(provider, preset, batch, dtype, facts["device"])
            error = disagreement(losses[provider], losses["plain"], dtype)
            if not error < 1:
                wrong += 1
                verdict = f"loss {losses[provider]:.6g} beside plain's {losses['plain']:.6g}"
                say(f"memory {dtype}: {provider} is WRONG and is not reported, {verdict}")
                continue
            found.append(
                Row(
                    **facts,
                    suite="memory",
                    op="prototype_cross_entropy",
                    direction="forward+backward",
                    provider=provider,
                    preset=shape.preset,
                    shape=f"B={batch} R={R} T={T} E={shape.prototype_dim} C={shape.num_clusters}",
                    batch=batch,
                    dtype=dtype,
                    rounds=1,
                    copy_gb_per_s=ceilings.copy_gb_per_s,
                    peak_extra_mib=peaks[provider],
                    worst_check=error,
                )
            )
    return found, wrong


def _loss(provider: str, features: Tensor, prototypes: Tensor, index: Tensor, targets: tuple) -> Tensor:
    if provider == "plain":
        (assignments,) = targets
        return soft_cross_entropy(F.linear(features, prototypes), assignments[index], TEMPERATURE)
    from stellar_fast.ops import SinkhornTargets, prototype_cross_entropy

    row, column, logits = targets
    soft = SinkhornTargets(row, column, SINKHORN_TEMPERATURE, logits)
    return prototype_cross_entropy(features, prototypes, soft, index=index, temperature=TEMPERATURE)


def _call(provider: str, R: int, T: int, C: int, E: int, dtype: torch.dtype, device: torch.device):
    """(the call, which returns the loss; bytes of the gradients that it leaves)"""
    generator = torch.Generator().manual_seed(0)
    features, clean = (F.normalize(torch.randn(n, E, generator=generator), dim=1).to(device) for n in (R, T))
    prototypes = F.normalize(torch.randn(C, E, generator=generator), dim=1).to(device)
    index = (torch.arange(R) % T).to(device)
    logits = clean @ prototypes.T
    if provider == "plain":
        targets: tuple = (sinkhorn(logits / SINKHORN_TEMPERATURE),)
    else:
        from stellar_fast.ops import sinkhorn_potentials

        targets = (*sinkhorn_potentials(logits, temperature=SINKHORN_TEMPERATURE), logits)
    leaves = features.requires_grad_(), prototypes.requires_grad_()

    def call() -> Tensor:
        for x in leaves:
            x.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = _loss(provider, *leaves, index, targets)
        loss.backward()
        return loss.detach()

    return call, sum(x.nbytes for x in leaves)


def main() -> None:
    """Print one provider's peak and loss: what `extra_mib` runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("provider", "preset", "batch", "dtype", "device"):
        parser.add_argument(name)
    options = parser.parse_args()
    shape, device, dtype = model_shape(options.preset), torch.device(options.device), DTYPES[options.dtype]
    _call(options.provider, 4, 2, 8, shape.prototype_dim, dtype, device)[0]()  # what a library loads at its first use
    R, T = sizes(shape, int(options.batch))
    call, gradients = _call(options.provider, R, T, shape.num_clusters, shape.prototype_dim, dtype, device)
    losses: list[Tensor] = []
    peak = peak_extra_mib(lambda: losses.append(call()), device)
    print(peak - gradients / 2**20, losses[0].item())


if __name__ == "__main__":
    main()
