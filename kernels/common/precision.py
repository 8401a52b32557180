"""Precision that the references compute in."""

import contextlib

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, or fp64 where it was given: a float64 model is its own oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A block on the device of x whose products are in the dtypes that they are given in."""
    kind = x.device.type
    # "meta" has no autocast to switch off
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
