"""A request to stop a run, and waits that end when it comes."""

import signal
import time
from collections.abc import Callable
from typing import Any

from runner.cache.store import Waiting


class StopRequest:
    """Whether the user asked the run to stop. The first signal asks; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Handles SIGINT, SIGTERM, and SIGHUP of a terminal that closes, unless it is ignored, as by nohup."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.raise_if_requested()
        self.requested = True

    def raise_if_requested(self) -> None:
        """KeyboardInterrupt after a request."""
        if self.requested:
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        """Waits; KeyboardInterrupt after a request."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.raise_if_requested()
            time.sleep(min(left, 0.1))


class LockWait(Waiting):
    """Reports once who holds the lock of `name`; the wait ends when the user asks to stop."""

    def __init__(self, name: str, stop: StopRequest, note: Callable[[str], None]) -> None:
        self._name, self._stop, self._note = name, stop, note

    def started(self, holder: str) -> None:
        """Reports the holder."""
        self._note(f"{self._name}: waiting for {holder}, which uses it or what it needs")

    def tick(self) -> None:
        """KeyboardInterrupt after a request to stop."""
        self._stop.raise_if_requested()
