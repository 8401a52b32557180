"""Peak memory of the prototype loss at the sizes of a large batch, forward and backward.

Each provider runs in a process of its own. What counts is beyond the gradients and the inputs, among them the clean
view's logits, or plain's assignments.
"""

import argparse
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DTYPES, peak_extra_mib
from benchmarks.plain.objectives import sinkhorn, soft_cross_entropy
from benchmarks.shapes import ModelShape, model_shape

BATCH = 128  # images
PROVIDERS = ("plain", "stellar_fast")
TEMPERATURE, SINKHORN_TEMPERATURE = 0.12, 0.06


def sizes(shape: ModelShape, batch: int) -> tuple[int, int]:
    """(predictions, targets): tokens of the masked views and of the clean one."""
    targets = batch * shape.num_sparse_tokens
    return targets * shape.num_masks, targets


def extra_mib(provider: str, preset: str, batch: int, dtype: str, device: str) -> float:
    """The peak in MiB, of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.model.memory", provider, preset, str(batch), dtype, device]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return float(run.stdout.split()[-1])


def _loss(provider: str, features: Tensor, prototypes: Tensor, index: Tensor, targets: tuple) -> Tensor:
    if provider == "plain":
        (assignments,) = targets
        return soft_cross_entropy(F.linear(features, prototypes), assignments[index], TEMPERATURE)
    from stellar_fast.ops import SinkhornTargets, prototype_cross_entropy

    row, column, logits = targets
    soft = SinkhornTargets(row, column, SINKHORN_TEMPERATURE, logits)
    return prototype_cross_entropy(features, prototypes, soft, index=index, temperature=TEMPERATURE)


def _call(provider: str, R: int, T: int, C: int, E: int, dtype: torch.dtype, device: torch.device):
    """(the call, bytes of the gradients that it leaves)"""
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

    def call() -> None:
        for x in leaves:
            x.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = _loss(provider, *leaves, index, targets)
        loss.backward()

    return call, sum(x.nbytes for x in leaves)


def main() -> None:
    """Print one provider's peak: what `extra_mib` runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("provider", "preset", "batch", "dtype", "device"):
        parser.add_argument(name)
    options = parser.parse_args()
    shape, device, dtype = model_shape(options.preset), torch.device(options.device), DTYPES[options.dtype]
    _call(options.provider, 4, 2, 8, shape.prototype_dim, dtype, device)[0]()  # what a library loads at its first use
    R, T = sizes(shape, int(options.batch))
    call, gradients = _call(options.provider, R, T, shape.num_clusters, shape.prototype_dim, dtype, device)
    peak = peak_extra_mib(call, device)
    print("nan" if peak is None else peak - gradients / 2**20)


if __name__ == "__main__":
    main()
