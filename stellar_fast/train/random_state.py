"""Every source of random numbers of a process, as values that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_random_state(generator: torch.Generator) -> dict[str, Any]:
    """The states of `generator` and of the global ones, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  the global state, which others may draw from
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()  # plain values load with weights_only
    return {
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if generator.device.type == "cuda" else None,
        "numpy": numpy_state,
        "python": random.getstate(),
    }


def set_random_state(generator: torch.Generator, state: dict[str, Any]) -> None:
    """Put back what `get_random_state` gave."""
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(state["python"])
