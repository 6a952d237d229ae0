"""A connection between the runs of two machines: lines of JSON over TCP, with heartbeats in both directions.

Both sides know a secret. Each sends a random nonce; a key for this connection follows from both and the secret, and every line
begins with its HMAC over the sender, the line's number and its text. So a line of somebody else, of another connection, out of
order or sent twice ends the connection. Nothing is encrypted.
"""

import contextlib
import hmac
import json
import math
import os
import queue
import socket
import threading
import time
from typing import Any

from runner.multi_node.messages import Message, parsed

HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 60  # without a line, counted only while this process itself runs; then the other side counts as gone
GREETING_SECONDS = 10.0  # for the nonces
NONCE_BYTES, MAC_BYTES = 32, 64  # the latter in hexadecimal
LONGEST = 16 * 2**20  # bytes of a line
LONGEST_TOLD = 50_000  # characters of a text in a message


class ConnectionClosed(Exception):  # noqa: N818  # the caller decides whether it is an error
    """The other side closed the connection, died, or was silent for too long."""


class ForeignError(ConnectionClosed):
    """The other side does not know the secret, or sent what no run sends."""


class Connection:
    """One end of a connection. Received messages are queued. `is_main` on machine 0."""

    def __init__(self, connected: socket.socket, secret: bytes, *, is_main: bool) -> None:
        """Exchanges nonces; ConnectionClosed if the other side sends none in time."""
        self._socket, self._is_main = connected, is_main
        self._key = self._greeted(secret)
        self._received: queue.Queue[Message | type[ConnectionClosed]] = queue.Queue()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._sent = self._heard = 0  # lines
        self._last_heard = time.monotonic()
        connected.settimeout(HEARTBEAT_SECONDS)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True, name="connection").start()

    def send(self, **message: Any) -> None:
        """Sends a message; long texts are cut. A failure shows only when something is received."""
        cut = {name: value[:LONGEST_TOLD] if isinstance(value, str) else value for name, value in message.items()}
        self._write(json.dumps(cut).encode())

    def receive(self, seconds: float = 0.0) -> Message | None:
        """The next message; None if none comes within `seconds`. ConnectionClosed after the last one."""
        try:
            message = self._received.get(timeout=seconds) if seconds else self._received.get_nowait()
        except queue.Empty:
            return None
        if isinstance(message, type):
            self._received.put(message)
            raise message
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

    def _greeted(self, secret: bytes) -> bytes:
        """The key of this connection."""
        mine, theirs, deadline = os.urandom(NONCE_BYTES), b"", time.monotonic() + GREETING_SECONDS
        try:
            self._socket.sendall(mine)
            while len(theirs) < NONCE_BYTES:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                if not (data := self._socket.recv(NONCE_BYTES - len(theirs))):
                    raise ConnectionClosed
                theirs += data
        except (OSError, ConnectionClosed):
            self._socket.close()
            raise ConnectionClosed from None
        nonces = mine + theirs if self._is_main else theirs + mine
        return hmac.digest(secret, b"stockpot machines 1\n" + nonces, "sha256")

    def _mac(self, line: bytes, *, number: int, from_main: bool) -> bytes:
        return hmac.digest(self._key, b"%d %d\n%b" % (from_main, number, line), "sha256").hex().encode()

    def _write(self, line: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):
            if not self._closed.is_set():
                self._sent += 1
                self._socket.sendall(self._mac(line, number=self._sent, from_main=self._is_main) + line + b"\n")

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            self._write(b"")

    def _listen(self) -> None:
        end: type[ConnectionClosed] = ConnectionClosed
        try:
            self._read_lines()
        except ValueError:
            end = ForeignError
        except OSError:
            pass
        self._last_heard = -math.inf
        self._received.put(end)
        self.close()

    def _read_lines(self) -> None:
        """Queues messages until the connection ends; ValueError for a line that is not the other side's next one."""
        silent, rest = 0, bytearray()
        while silent < SILENT_SECONDS:
            try:
                data = self._socket.recv(2**16)
            except TimeoutError:
                silent += 1
                continue
            if not data:
                return
            silent, start = 0, len(rest)
            rest += data
            while (end := rest.find(b"\n", start)) >= 0:
                self._take(bytes(rest[:end]))
                del rest[: end + 1]
                start = 0
            if len(rest) > (LONGEST if self._heard else 2**16):
                raise ValueError("too long")

    def _take(self, line: bytes) -> None:
        mac, text = line[:MAC_BYTES], line[MAC_BYTES:]
        self._heard += 1
        if not hmac.compare_digest(mac, self._mac(text, number=self._heard, from_main=not self._is_main)):
            raise ValueError("not of the other side")
        self._last_heard = time.monotonic()
        if text:
            self._received.put(parsed(text, from_main=not self._is_main))
