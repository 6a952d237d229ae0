"""A process that has imported torch, and whatever else takes seconds to import, and forks the workers of one stage after the
other, which begin at once. It is started beside the first stages of a run, which need no torch.

A run without it has the same results, later: where there is a GPU, whose driver no fork may inherit, and where fork is not
safe.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from runner.execution import worker

MESSAGE_BYTES = 2**16
PATIENCE = 120.0  # seconds for the imports, from a cold disk, before a worker is started without the server


class Forked:
    """A worker that was forked, with as much of `subprocess.Popen` as `launch` uses."""

    def __init__(self, pid: int, server: socket.socket) -> None:
        self.pid, self._server = pid, server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        if self._code is None and select.select([self._server], [], [], 0)[0]:
            self._code = self._told()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        if self._code is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            self._code = self._told()
        return self._code

    def _told(self) -> int:
        """What the server says of its end. One that is gone says nothing; the worker then counts as killed, and is ended."""
        with contextlib.suppress(OSError):
            if message := self._server.recv(MESSAGE_BYTES):
                return int(json.loads(message)["code"])
        return -signal.SIGKILL


class ForkServer:
    """The server as the run sees it; it imports `modules` in their order while nobody asks for a worker.

    `place` is only there so that lists of processes show whose server it is.
    """

    def __init__(self, modules: Sequence[str], *, place: Path, environment: Mapping[str, str]) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(place), str(theirs.fileno()), *modules]
        quiet = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, modules: Sequence[str], arguments: Sequence[str], *, stdin: int, log: IO[bytes]) -> Forked:
        """A worker that finds `modules` imported, with these arguments and in a session of its own.

        ConnectionError if the server does not answer: it is ended then, and a worker that it may have forked ends when the
        other end of `stdin` closes.
        """
        request = json.dumps({"modules": modules, "arguments": arguments}).encode()
        try:
            self._connection.settimeout(PATIENCE)
            socket.send_fds(self._connection, [request], [stdin, log.fileno()])
            if message := self._connection.recv(MESSAGE_BYTES):
                return Forked(json.loads(message)["pid"], self._connection)
        except OSError as error:
            self.close()
            raise ConnectionError from error
        self.close()
        raise ConnectionError

    def close(self) -> None:
        """Ends the server, whose workers have ended."""
        self._connection.close()
        self._process.kill()  # it may be importing still
        self._process.wait()


def main() -> int:
    """Serves until the run is gone, unless there is a GPU; returns in each worker that was forked, when its work is done."""
    _place, connection, *modules = sys.argv[1:]
    arguments = _serve(socket.socket(fileno=int(connection)), modules)
    if arguments is None:
        return 0
    sys.argv[1:] = arguments
    return worker.main()


def _serve(connection: socket.socket, later: list[str]) -> list[str] | None:
    """Forks a worker for each request, one after the other; in a worker, returns its arguments."""
    with connection, contextlib.suppress(ConnectionError):
        while True:
            while later and not select.select([connection], [], [], 0)[0]:
                _import(later.pop(0))
            message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
            if not message:
                break
            request = json.loads(message)
            for module in request["modules"]:
                _import(module)
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():  # seen by torch alone; asking already spoils forks
                break
            gc.collect()
            gc.freeze()  # so that collecting garbage in a worker does not copy what they share
            pid = os.fork()
            if pid == 0:
                os.setsid()
                stdin, log = files
                for number, file in enumerate((stdin, log, log)):
                    os.dup2(file, number)
            for file in files:
                os.close(file)
            if pid == 0:
                return list(request["arguments"])
            connection.send(json.dumps({"pid": pid}).encode())
            _, status = os.waitpid(pid, 0)
            connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
    return None


def _import(module: str) -> None:
    with contextlib.suppress(Exception):  # the worker that needs it says what is wrong
        importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
