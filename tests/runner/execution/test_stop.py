"""A request to stop: which signals ask, and what a second one does."""

import os
import signal
from collections.abc import Iterator

import pytest

from runner.execution.stop import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # the suite may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_once_and_interrupts_the_second_time(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), number)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_a_run_under_nohup_survives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
