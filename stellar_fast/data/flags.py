"""Flags that a process shares with those it forks."""

import mmap
from typing import Any


class SharedFlags:
    """`count` flags, all of them down at first. Forked processes, such as a DataLoader's workers, see the same ones.

    A pickled copy, such as that of a worker that is spawned, begins with what was raised and shares nothing.
    """

    def __init__(self, count: int, raised: bytes = b""):
        self._count = count
        self._bytes = mmap.mmap(-1, max(1, count))
        self._bytes[: len(raised)] = raised

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._count, self._bytes[:])

    def __getitem__(self, place: int) -> bool:
        return bool(self._bytes[place])

    def put_up(self, place: int) -> bool:
        """Raise a flag; whether it was down. Two processes that raise it in the same instant may both hear so."""
        was_up, self._bytes[place] = self._bytes[place], 1
        return not was_up

    def sum(self) -> int:
        """How many are up."""
        return self._bytes[:].count(1)
