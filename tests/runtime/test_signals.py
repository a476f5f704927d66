"""A signal to stop is noticed once; its echo is ignored, and a second one ends the process."""

import signal
from types import SimpleNamespace

import pytest

from groupsae.runtime.signals import Stopped, first_signal, stopped_by_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_and_the_handlers_come_back(number: int) -> None:
    before, after = signal.getsignal(number), []

    def work() -> None:
        with stopped_by_signals():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # its echo does not disturb the end
                after.append(True)

    with pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.number == number
    assert after
    assert signal.getsignal(number) == before


def test_an_echo_is_ignored_and_a_second_signal_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    received: list[int] = []
    moments = iter([10.0, 11.0, 13.0])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr("groupsae.runtime.signals.time", clock)
    default = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with first_signal(received.append):
            send = signal.raise_signal
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            monkeypatch.setattr(signal, "raise_signal", ended.append)
            send(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, default)
    assert ended == [signal.SIGTERM]
    assert received == [signal.SIGTERM]


def test_submitits_signal_stops_where_submitit_waits_for_it() -> None:
    assert not callable(signal.getsignal(signal.SIGUSR2))
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with pytest.raises(Stopped), stopped_by_signals():
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
