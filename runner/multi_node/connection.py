"""A connection between the runs of two machines: lines of JSON over TCP, with heartbeats in both directions."""

import contextlib
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

HEARTBEAT = b"\n"  # an empty line
HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 60  # without a line, counted only while this process itself runs; then the other side counts as gone
LONGEST = 16 * 2**20  # bytes of a line

Message = Mapping[str, Any]


class ConnectionClosed(Exception):  # noqa: N818  # the caller decides whether it is an error
    """The other side closed the connection, died, or was silent for too long."""


class Connection:
    """One end of a connection. Received messages are queued."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._received: queue.Queue[Message | None] = queue.Queue()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._last_heard = time.monotonic()
        connected.settimeout(HEARTBEAT_SECONDS)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True, name="connection").start()

    def send(self, **message: Any) -> None:
        """Sends a message. A failure shows only when something is received."""
        self._write(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> Message | None:
        """The next message; None if none comes within `seconds`. ConnectionClosed after the last one."""
        try:
            message = self._received.get(timeout=seconds) if seconds else self._received.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            self._received.put(None)
            raise ConnectionClosed
        return message

    @property
    def silence(self) -> float:
        """Seconds since the last line from the other side; infinite after the connection ended."""
        return time.monotonic() - self._last_heard

    def close(self) -> None:
        """Ends the connection; what was sent before still arrives."""
        self._closed.set()
        with self._sending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            self._socket.close()

    def _write(self, line: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):
            if not self._closed.is_set():
                self._socket.sendall(line)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            self._write(HEARTBEAT)

    def _listen(self) -> None:
        silent, rest = 0, b""
        with contextlib.suppress(OSError, ValueError):
            while silent < SILENT_SECONDS and len(rest) <= LONGEST:
                try:
                    data = self._socket.recv(2**16)
                except TimeoutError:
                    silent += 1
                    continue
                if not data:
                    break
                silent, self._last_heard = 0, time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                for line in filter(None, lines):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._received.put(message)
        self._last_heard = -math.inf
        self._received.put(None)
