"""Messages between the runs of two machines: lines of JSON over TCP, with signs of life in both directions."""

import contextlib
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

BEAT = b"\n"  # an empty line: nothing to say, but alive
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60  # without a line, counted while this process runs itself; then the other is taken for gone
LONGEST = 16 * 2**20  # bytes of a line

Message = Mapping[str, Any]


class Gone(Exception):  # noqa: N818  # whether it is an error is for the one who listens to say
    """The other side closed the connection, died, or was silent for too long."""


class Wire:
    """One end of a connection. What arrives is kept until it is asked for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._arrived: queue.Queue[Message | None] = queue.Queue()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._heard = time.monotonic()
        connection.settimeout(BEAT_SECONDS)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True, name="wire").start()

    def send(self, **message: Any) -> None:
        """Says something; whether it arrives is seen by what comes back."""
        self._put(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> Message | None:
        """The next message, None if there is none within `seconds`. Gone after the last one."""
        try:
            message = self._arrived.get(timeout=seconds) if seconds else self._arrived.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            self._arrived.put(None)
            raise Gone
        return message

    @property
    def quiet(self) -> float:
        """Seconds since the other side was last heard; infinite when it is gone."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Ends the connection; what was said before still arrives."""
        self._closed.set()
        with self._sending, contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            self._connection.close()

    def _put(self, line: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):
            if not self._closed.is_set():
                self._connection.sendall(line)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            self._put(BEAT)

    def _listen(self) -> None:
        silent, rest = 0, b""
        with contextlib.suppress(OSError, ValueError):
            while silent < SILENT_SECONDS and len(rest) <= LONGEST:
                try:
                    found = self._connection.recv(2**16)
                except TimeoutError:
                    silent += 1
                    continue
                if not found:
                    break
                silent, self._heard = 0, time.monotonic()
                *lines, rest = (rest + found).split(b"\n")
                for line in filter(None, lines):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._arrived.put(message)
        self._heard = -math.inf
        self._arrived.put(None)
