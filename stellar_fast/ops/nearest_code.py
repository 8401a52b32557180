"""nearest_code: vector quantisation."""

from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.nearest_code import reference
from stellar_fast.ops.checks import check_floating, check_shapes


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry by squared L2 distance.

    Args:
        z: (N, E) floating vectors.
        codebook: (S, E) floating entries.

    Returns:
        (N,) int64; ties take the lowest index; no gradient.

    Raises:
        ValueError: widths that differ, or integer tensors.

    Source: VQ-VAE (arXiv 1711.00937).
    """
    backend.pick("nearest_code", z.device.type)
    check_shapes(z=(z, "NE"), codebook=(codebook, "SE"))
    check_floating(z=z, codebook=codebook)
    return reference.nearest_code(z.detach(), codebook.detach())
