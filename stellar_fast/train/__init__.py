"""Training: configuration, the loop, checkpoints, and where the numbers go.

from stellar_fast.train import TrainConfig, train

result = train(TrainConfig(data="photos", out="runs/first", preset="tiny"))
"""

import importlib
from typing import TYPE_CHECKING, Any

from stellar_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from stellar_fast.train.errors import NonFiniteLossError, RunEndedError
    from stellar_fast.train.loggers import JsonLines, Logger, RichProgress, TensorBoard
    from stellar_fast.train.loop import TrainResult, train

_HOMES = {
    "train": "loop",
    "TrainResult": "loop",
    "NonFiniteLossError": "errors",
    "RunEndedError": "errors",
    "Logger": "loggers",
    "JsonLines": "loggers",
    "RichProgress": "loggers",
    "TensorBoard": "loggers",
}

__all__ = [
    "JsonLines",
    "Logger",
    "NonFiniteLossError",
    "RichProgress",
    "RunEndedError",
    "TensorBoard",
    "TrainConfig",
    "TrainResult",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the options of a run (`stellar-fast train --help`) do not need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
