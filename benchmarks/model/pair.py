"""Build the two sides of a benchmark: same weights, same inputs, and a verdict on whether they agree."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Call
from benchmarks.plain import PlainStellar
from benchmarks.shapes import MASKING_RATIO, ModelShape

# Errors are norms over a tensor, relative to the fp32 plain result. In fp32 the sides differ by the order of their sums
# alone: fp32 plain is within 1e-6 (outputs) and 1e-5 (gradients) of fp64 on b16.
FP32_TOLERANCE = {"output": 1e-5, "gradient": 1e-4}
# In reduced precision a side may be this many times further from the fp32 plain result than reduced plain is, plus one
# rounding.
REDUCED_FACTOR = 2.0


@dataclass(frozen=True)
class Check:
    """One verified tensor: its error as a share of the tolerance; below 1 passes."""

    name: str
    error: float


@dataclass(frozen=True)
class Case:
    """A comparison, ready to be timed.

    `checks` says by provider how well it agrees; one without was verified elsewhere. `threads` is torch's number of
    them, where it is not the process's.
    """

    suite: str
    shape: str
    batch: int
    flops: float
    bytes: int
    calls: dict[str, Call]
    checks: dict[str, list[Check]]
    op: str = ""
    direction: str = "forward"
    preset: str = ""
    threads: int | None = None

    def worst(self, provider: str) -> Check:
        return max(self.checks[provider], key=lambda check: check.error)


def build_plain(shape: ModelShape, device: torch.device, seed: int = 0) -> PlainStellar:
    """The plain model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PlainStellar(
            encoder=vars(shape.encoder),
            decoder=vars(shape.decoder),
            num_sparse_tokens=shape.num_sparse_tokens,
            num_clusters=shape.num_clusters,
            predictor_hidden_dim=shape.predictor_hidden_dim,
            prototype_dim=shape.prototype_dim,
        )
    return model.to(device)


def build_stellar_fast(shape: ModelShape, plain: PlainStellar) -> nn.Module:
    """This package's model with the weights of a plain one."""
    from stellar_fast import StellarModel

    model = StellarModel(
        encoder=shape.encoder,
        decoder=shape.decoder,
        num_sparse_tokens=shape.num_sparse_tokens,
        num_clusters=shape.num_clusters,
        predictor_hidden_dim=shape.predictor_hidden_dim,
        prototype_dim=shape.prototype_dim,
        num_masks=shape.num_masks,
        num_local_crops=shape.num_local_crops,
        masking_ratio=MASKING_RATIO,
        color_augmentation=False,
    )
    model.load_upstream_state_dict(plain.state_dict())
    return model.to(plain.sparse_tokens.device)


def random_images(count: int, size: int, device: torch.device, seed: int) -> Tensor:
    """Images (count, 3, size, size) in [0, 1]: smooth colour fields with noise, so that tokens differ as in photos."""
    generator = torch.Generator().manual_seed(seed)
    fields = F.interpolate(torch.rand(count, 3, 5, 5, generator=generator), size=(size, size), mode="bicubic")
    noise = torch.rand(count, 3, size, size, generator=generator) - 0.5
    return (fields + 0.2 * noise).clamp(0, 1).to(device)


def random_keep_indices(rows: int, shape: ModelShape, device: torch.device, seed: int) -> Tensor:
    """Visible patches (rows, kept) int64 of masked views."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rows, shape.num_patches, generator=generator)
    return noise.argsort(dim=1)[:, : shape.num_kept].to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a reduced dtype; nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def compare(
    results: Mapping[str, Callable[[], Mapping[str, Tensor]]],
    exact: Callable[[], Mapping[str, Tensor]],
    dtype: torch.dtype,
    fp32_tolerance: float = FP32_TOLERANCE["output"],
) -> dict[str, list[Check]]:
    """Check every provider's tensors against the exact (fp32 plain) ones.

    Args:
        results: provider name -> function that returns its tensors by name; must hold "plain". A name that starts with
            "gradient." has the gradients' tolerance. Names must be the same on all sides.
        exact: the fp32 plain tensors.
        dtype: what the providers ran in; below fp32 they are held against plain's own error.
        fp32_tolerance: of outputs in fp32.
    """
    truth = exact()
    in_fp32 = dtype == torch.float32
    errors = {
        # fp32 plain is the truth itself: running it twice would only cost time
        provider: relative_errors(truth if in_fp32 and provider == "plain" else produce(), truth)
        for provider, produce in results.items()
    }
    checks: dict[str, list[Check]] = {}
    for provider, by_name in errors.items():
        checks[provider] = []
        for name, error in by_name.items():
            if in_fp32:
                tolerance = FP32_TOLERANCE["gradient"] if name.startswith("gradient.") else fp32_tolerance
            else:
                tolerance = REDUCED_FACTOR * errors["plain"].get(name, 0.0) + torch.finfo(dtype).eps
            checks[provider].append(Check(name, error / tolerance))
    return checks


def relative_errors(tensors: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| for each tensor by name, infinite where something is missing, misshapen or not finite.

    A gradient's |b| is at least a tenth of what a gradient of its size has on average: that of a key's bias is zero but
    for rounding, since softmax ignores a shift.
    """
    gradients = [b for name, b in truth.items() if name.startswith("gradient.")]
    mean_square = sum(float(b.norm()) ** 2 for b in gradients) / max(1, sum(b.numel() for b in gradients))
    errors = {}
    for name in truth.keys() | tensors.keys():
        a, b = tensors.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape or not torch.isfinite(a).all():
            errors[name] = float("inf")
            continue
        floor = 0.1 * (mean_square * b.numel()) ** 0.5 if name.startswith("gradient.") else 1e-12
        errors[name] = float((a.float() - b.float()).norm()) / max(float(b.norm()), floor)
    return errors
