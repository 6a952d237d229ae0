"""The fork server: imports torch and other slow modules once, and forks the workers of one stage after another, which then
start without delay. It starts beside the first stages of a run, which need no torch; if none does, it forks them too.

Without it a run only takes longer. It is not used with a GPU, whose driver does not survive a fork, nor where fork is unsafe.
The processes of a group start under `accelerate launch`.
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

from runner.engine import launch
from runner.execution import worker
from runner.resources import available_cores
from runner.safe_path import PYTHON
from runner.stages import stage_kinds

MESSAGE_BYTES = 2**16
IMPORT_SECONDS = 120.0  # for the imports from a cold disk; then a worker starts without the server


class ForkedWorker:
    """A forked worker, with the part of `subprocess.Popen` that `launch` uses."""

    def __init__(self, pid: int, server: socket.socket) -> None:
        self.pid, self._server = pid, server
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the worker runs."""
        if self._code is None and select.select([self._server], [], [], 0)[0]:
            self._code = self._reported_code()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        if self._code is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            self._code = self._reported_code()
        return self._code

    def _reported_code(self) -> int:
        """The exit code that the server reports. If the server is gone, the worker counts as killed."""
        with contextlib.suppress(OSError):
            if message := self._server.recv(MESSAGE_BYTES):
                return int(json.loads(message)["code"])
        return -signal.SIGKILL


class ForkServer:
    """The run's handle on the server, which imports `modules` in order while no worker is requested.

    `place` only identifies the server in process lists.
    """

    def __init__(self, modules: Sequence[str], *, place: Path, environment: Mapping[str, str]) -> None:
        self.modules = tuple(modules)
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*PYTHON, "-m", __name__, str(place), str(theirs.fileno()), *modules]
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

    def start(self, modules: Sequence[str], arguments: Sequence[str], *, stdin: int, log: IO[bytes]) -> ForkedWorker:
        """A worker with `modules` imported, in its own session.

        ConnectionError if the server does not answer; the server is then ended, and a worker that it may have forked ends when
        the other end of `stdin` closes.
        """
        request = json.dumps({"modules": modules, "arguments": arguments}).encode()
        with contextlib.suppress(OSError):
            self._connection.settimeout(IMPORT_SECONDS)
            socket.send_fds(self._connection, [request], [stdin, log.fileno()])
            if message := self._connection.recv(MESSAGE_BYTES):
                return ForkedWorker(json.loads(message)["pid"], self._connection)
        self.close()
        raise ConnectionError

    def close(self) -> None:
        """Ends the server after its workers have ended."""
        self._connection.close()
        self._process.kill()  # it may still be importing
        self._process.wait()


def fork_server(modules: Sequence[str], *, place: Path) -> ForkServer | None:
    """A server that imports `modules` and forks workers; None where workers cannot be forked."""
    if not launch.can_fork():
        return None
    return ForkServer(list(dict.fromkeys(modules)), place=place, environment=launch.environment_of(available_cores()))


def main() -> int:
    """Serves until the run ends or a GPU is found; in each forked worker returns when its work is done."""
    _place, connection, *modules = sys.argv[1:]
    stage_kinds()  # each worker looks its own up
    arguments = _serve(socket.socket(fileno=int(connection)), modules)
    if arguments is None:
        return 0
    sys.argv[1:] = arguments
    return worker.main()


def _serve(connection: socket.socket, later: list[str]) -> list[str] | None:
    """Forks one worker per request, one at a time; in a worker, returns its arguments."""
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
            if torch is not None and torch.cuda.is_available():  # only torch sees it; this check itself makes forks unusable
                break
            gc.collect()
            gc.freeze()  # so that garbage collection in a worker does not copy shared pages
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
    with contextlib.suppress(Exception):  # the worker that needs the module reports the error
        importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
