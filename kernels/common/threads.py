"""Launch knobs of C++ on a CPU that has no others: threads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Threads of an operator's forward and of its backward."""

    forward: int
    backward: int


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """All that torch may use: fewer pay where waking them takes longer than their work, or memory is the limit."""
    return Config(torch.get_num_threads(), torch.get_num_threads())


def counts() -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on, and all that torch may use: times of counts in between differ less than runs."""
    most = torch.get_num_threads()
    steps = (count << power for power in range(most.bit_length()) for count in (1, 3))
    return sorted({count for count in steps if count < most} | {most})


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of the forward alone and of the backward alone: their times do not interact."""
    start = heuristic(shape, dtype, "cpu")
    found = [start, *(Config(n, start.backward) for n in counts()), *(Config(start.forward, n) for n in counts())]
    yield from dict.fromkeys(found)


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether torch may use as many now."""
    return all(1 <= count <= torch.get_num_threads() for count in (config.forward, config.backward))
