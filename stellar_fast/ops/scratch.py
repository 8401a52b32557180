"""CPU memory that a thread keeps from one call to the next."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Of each place: a hidden activation of 2,560 rows (kernels/linear/config.py) of 3,072 floats are 30 MiB, one of the
# VQGAN of 256 x 256 pixels and 128 channels 32.
LIMIT = 32 * 2**20
_of_thread = threading.local()


def scratch(
    shape: Sequence[int],
    dtype: torch.dtype,
    place: str,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Memory until the next call for the same `place` in this thread, kept where it is not above LIMIT.

    Each layer needs these blocks, and one of this size that is freed goes back to the system each time: its page faults
    cost more than what is computed in it (docs/log.md).
    """
    size = math.prod(shape) * dtype.itemsize
    if size > LIMIT:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    kept = getattr(_of_thread, place, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_of_thread, place, kept)
    block = kept[:size].view(dtype)
    if memory_format == torch.channels_last:
        B, C, H, W = shape
        return block.view(B, H, W, C).permute(0, 3, 1, 2)
    return block.view(shape)


def release_scratch() -> None:
    """Give back what this thread keeps between calls."""
    vars(_of_thread).clear()
