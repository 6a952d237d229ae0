"""Liveness of the workers of a stage: each registers itself; the run can show their stacks and kill them, even if they are
suspended or their launcher is gone.

A worker locks a file with its process id, so a free lock means that the process has ended, even if its id was reused. The file
name has the host name, since other machines may use the same folder.
"""

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

from runner.cache.heartbeat import this_machine

FOLDER = "workers"  # in scratch
END_SECONDS = 10.0  # for killed processes to end
SHOW_SECONDS = 0.5  # for stacks to be written


def register(scratch: Path, name: str) -> IO[str]:
    """Registers this process, which from now on writes its stacks on request; it counts as alive while the returned file is
    open.

    Call it before other threads start, so that they block the signal too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_show_when_asked, daemon=True, name="stacks").start()
    path = scratch / FOLDER / f"{this_machine().host}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="ascii")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _show_when_asked() -> None:
    # A thread that holds the interpreter's lock: a signal handler that reads frames of running threads has crashed.
    while True:
        signal.sigwait({signal.SIGUSR1})
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def live_workers(scratch: Path) -> list[int]:
    """Process ids of the live workers on this machine."""
    found = []
    for path in sorted((scratch / FOLDER).glob(f"{this_machine().host}-*")):
        with path.open("r+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if text := file.read():
                    found.append(int(text))
    return found


def show_stacks(scratch: Path) -> None:
    """Makes every worker write the stacks of its threads to its log; a suspended one is resumed for it."""
    for pid in live_workers(scratch):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGCONT)
    time.sleep(SHOW_SECONDS)


def end(scratch: Path) -> None:
    """Kills the live workers and waits for their end, since the next ones use the same folder."""
    deadline = time.monotonic() + END_SECONDS
    while (pids := live_workers(scratch)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
