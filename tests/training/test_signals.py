"""Signals are noted, not obeyed, as long as a run can still save."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from instructsam.training.signals import SIGNALS, StopSignals


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_by_name_and_the_handlers_come_back(name):
    before, number = handlers(), getattr(signal, name)
    with StopSignals() as stop:
        assert stop.received is None and signal.getsignal(number) != before[SIGNALS.index(number)]
        send(name)
        assert stop.received == name
    assert handlers() == before


def test_handlers_come_back_after_an_error():
    before = handlers()
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert handlers() == before


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_only_an_interrupt_after_another_signal_interrupts_at_once(first):
    with StopSignals() as stop:
        send(first)
        send("SIGTERM")
        send("SIGUSR1")
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
    assert stop.received in (first, "SIGUSR1", "SIGTERM")


def test_in_another_thread_nothing_is_touched():
    before, seen = handlers(), []

    def enter() -> None:
        with StopSignals() as stop:
            seen.append((handlers(), stop.received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, None)] and handlers() == before
