"""Detects a training step that does not end, by a file that its first process touches before each step and micro-batch.

Only the monotonic clock of this process counts; time in which this process itself was suspended does not.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

HEARTBEAT = "heartbeat"  # in scratch
LONGEST = 20  # times the longest step so far
FIRST = 4  # times as long until the first step has ended: loading, forming a group, compiling
FIRST_SECONDS = 600.0  # and no less than this
COUNTED_SECONDS = 1.0  # at most, between two checks


class Heartbeat:
    """The workers' side: touches the file whenever the training asks whether it should stop."""

    def __init__(self, scratch: Path, should_stop: Callable[[], bool]) -> None:
        self._path, self._should_stop = scratch / HEARTBEAT, should_stop

    def __call__(self) -> bool:
        """Whether the training should stop."""
        try:
            os.utime(self._path)
        except FileNotFoundError:
            self._path.touch()
        return self._should_stop()


class Watchdog:
    """The run's side: how long the file was not touched, and whether that is too long."""

    def __init__(self, scratch: Path, *, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._limit, self._now = scratch / HEARTBEAT, 60 * minutes, now
        self._last_look, self._last_beat = now(), self._beat()
        self._beats = 0
        self.quiet = 0.0  # seconds since the last beat
        self._longest = 0.0

    def is_too_quiet(self) -> bool:
        """Checks the file; to be called several times a second."""
        look = self._now()
        self.quiet += min(look - self._last_look, COUNTED_SECONDS)
        self._last_look = look
        if (beat := self._beat()) != self._last_beat:
            if self._beats > 1:
                self._longest = max(self._longest, self.quiet)
            self._last_beat, self.quiet = beat, 0.0
            self._beats += 1
        limit = self._limit if self._beats > 1 else max(FIRST * self._limit, FIRST_SECONDS)
        return self.quiet > max(limit, LONGEST * self._longest)

    def _beat(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self._path.stat().st_mtime_ns
        return None
