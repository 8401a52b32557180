import os
import signal
import threading
from collections.abc import Iterator

import pytest

from stellar_fast.train import signals
from stellar_fast.train.signals import leave_signals_to_the_parent, stop_on_signals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Signals as a command finds them, and back."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_a_request_and_so_is_another_within_a_second(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert (stop.requested, stop.signal) == (False, None)
        send(number)
        send(number)
        assert (stop.requested, stop.signal) == (True, number)
        send(signal.SIGTERM)
        assert stop.signal == number  # the first one counts
    assert signal.getsignal(number) is before


def test_a_second_one_of_its_kind_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_REQUEST_S", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)  # of another kind: a launcher that ends what it has warned
        assert stop.requested
        send(signal.SIGINT)
    with stop_on_signals() as stop:
        for _ in range(3):  # the system sends it every second
            send(signal.SIGXCPU)
        assert stop.signal == signal.SIGXCPU


def test_what_the_caller_ignores_or_handles_stays_so() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    with stop_on_signals() as stop:
        send(signal.SIGHUP)
        send(signal.SIGUSR1)
        assert not stop.requested and seen == [signal.SIGUSR1]


def test_waiting_ends_with_the_signal() -> None:
    with stop_on_signals() as stop:
        assert stop.wait_for(lambda: 5) == 5
        threading.Timer(0.05, send, [signal.SIGUSR2]).start()
        assert stop.wait_for(lambda: threading.Event().wait()) is None
        assert stop.signal == signal.SIGUSR2
        assert stop.wait_for(lambda: 5) is None


def test_workers_ignore_what_the_parent_handles() -> None:
    leave_signals_to_the_parent(0)
    assert {signal.getsignal(number) for number in HANDLED} == {signal.SIG_IGN}


def test_outside_of_the_main_thread_signals_stay_as_they_are() -> None:
    found: list[bool] = []

    def run() -> None:
        with stop_on_signals() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
