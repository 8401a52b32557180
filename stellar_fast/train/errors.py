"""How a run ends before its last step."""

from __future__ import annotations

from pathlib import Path

import torch

from stellar_fast.data.loader import WorkersLost
from stellar_fast.models.weights import WeightsMismatchError


class RunEndedError(RuntimeError):
    """The run ended early. `checkpoint` holds the steps done, if any were; the cause is this error's."""

    def __init__(self, message: str, checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class NonFiniteLossError(RunEndedError):
    """The loss was not finite for `max_nonfinite` steps in a row. The weights are those before the first of them."""


class RankError(ValueError):
    """What keeps one process of a run from going on, raised alike on all of them."""


_TOLD = (OSError, ValueError, NotImplementedError, WeightsMismatchError, RunEndedError, WorkersLost)


def sentence(error: Exception) -> str | None:
    """What to tell the user of an error, without a path into the code; None for one that is not theirs, a bug."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"memory ran out: {' '.join(text.split())[:200] or type(error).__name__}"
    return text if isinstance(error, _TOLD) else None
