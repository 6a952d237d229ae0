"""Runs hostile input through a function in a process of its own, which may take neither much time nor much memory."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, BYTES = 2.0, 500 * 2**20  # of processor time, and of memory beyond what the tests have
PATIENCE = 60.0  # seconds that a busy machine may take


def bounded(work: Callable[[], object]) -> int:
    """The exit code that `work` returns or raises, 0 for None. Fails if it takes more than it may, or hangs."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            Path("/proc/self/clear_refs").write_text("5")  # what the tests had at most does not count
            before, begun = _memory("VmRSS"), time.process_time()
            try:
                found = work()
                code = found if isinstance(found, int) else 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            seconds, most = time.process_time() - begun, _memory("VmHWM") - before
            if seconds > SECONDS or most > BYTES:
                print(f"took {seconds:.1f} s and {most / 2**20:.0f} MiB", file=sys.stderr)
                code = 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + PATIENCE
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("it hangs")
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(done[1])
    assert code not in (70, 71), {70: "a traceback", 71: "too much time or memory"}[code]
    return code


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
