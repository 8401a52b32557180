"""Signals as requests to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

ALWAYS = (signal.SIGINT, signal.SIGTERM)
# What schedulers warn with, and a terminal that hangs up. Whoever ignores or handles one of these keeps it (nohup).
WHERE_UNUSED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ONE_REQUEST_S = 1.0  # a supervisor, a process group and a launcher may all pass on what was asked once


class _Stopped(BaseException):
    """Raised by a signal inside of `Stop.wait_for` alone."""


class Stop:
    """What a signal has asked for: `signal` is the number of the first, None where none came."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.signal is not None

    def wait_for(self, function: Callable[[], T]) -> T | None:
        """What the function gives; None, and the function is left where it stands, once a signal asks to stop."""
        try:
            try:
                self._waiting = True
                return None if self.requested else function()
            finally:
                self._waiting = False
        except _Stopped:
            return None

    def _request(self, number: int) -> None:
        self.signal = self.signal or number
        if self._waiting:
            self._waiting = False
            raise _Stopped


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the first INT, TERM, HUP, USR1, USR2 or XCPU into a request to stop.

    A second one of its kind does what it always does, once a second has passed. XCPU comes anew every second, and is a
    request however often.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    unused = [number for number in WHERE_UNUSED if signal.getsignal(number) is signal.SIG_DFL]
    previous: dict[int, Any] = {n: signal.getsignal(n) or signal.SIG_DFL for n in (*ALWAYS, *unused)}
    first: dict[int, float] = {}

    def request(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number != signal.SIGXCPU and now - first.setdefault(number, now) > ONE_REQUEST_S:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        else:
            stop._request(number)

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a hang-up reach the whole process group, but the parent says when the workers end."""
    for number in (*ALWAYS, *WHERE_UNUSED):
        signal.signal(number, signal.SIG_IGN)
