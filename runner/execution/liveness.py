"""The workers of a stage that live: how each makes itself known, and how the run that started them shows their stacks and ends
them, even where they were stopped or their launcher is gone.

A worker holds a lock on a file with its process id, so a lock that is free means a process that has ended, whoever has its id
now. The file carries the machine's name: others may work in the same folder.
"""

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from runner.cache.heartbeat import this_machine

FOLDER = "workers"  # in scratch
END_SECONDS = 10.0  # for processes that were killed to be gone
SHOW_SECONDS = 0.5  # for stacks to be written


def announce(scratch: Path, name: str) -> IO[str]:
    """Makes this process known; keep the file, whose lock says that it lives. From now on it shows its stacks when asked.

    To be called before other threads begin, so that the signal reaches none of them.
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
    # In a thread that holds the interpreter's lock: a handler that reads the frames of threads that run has crashed.
    while True:
        signal.sigwait({signal.SIGUSR1})
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def living(scratch: Path) -> list[int]:
    """Process ids of the workers of this machine that have not ended."""
    return list(_living(scratch))


def _living(scratch: Path) -> Iterator[int]:
    for path in sorted((scratch / FOLDER).glob(f"{this_machine().host}-*")):
        with path.open("r+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if text := file.read():
                    yield int(text)


def show_stacks(scratch: Path) -> None:
    """Has every worker write to its log where each of its threads is; one that was stopped goes on for it."""
    for pid in living(scratch):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGCONT)
    time.sleep(SHOW_SECONDS)


def end(scratch: Path) -> None:
    """Kills the workers that still live, and waits until they are gone: what comes next works in the same folder."""
    deadline = time.monotonic() + END_SECONDS
    while (pids := living(scratch)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
