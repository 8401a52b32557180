"""Precision that the references compute in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, or fp64 where it was given: a float64 model is its own oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
