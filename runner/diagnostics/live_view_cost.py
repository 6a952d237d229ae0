"""Measures the cost of the live view: processor time of the parent process during a training, as a share of all cores.

    python -m runner.diagnostics.live_view_cost [RECIPE] [--stage base] [--rounds 3]

Runs the stage and its inputs on an empty cache, on a terminal of 120 columns. Counted is the process that the user started,
from the first report of the training to its last: it draws the view and waits for the workers. The limit is 1% of all cores.
Not a test, because the result depends on the machine.
"""

import argparse
import fcntl
import os
import pty
import statistics
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

import psutil

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
ROWS, COLUMNS = 40, 120
POLL_SECONDS = 0.2
LIMIT = 0.01  # of the processor time of the run


def main() -> int:
    """Prints the shares; returns 1 if the median is over LIMIT."""
    parser = argparse.ArgumentParser(description="The cost of the live view during a training.")
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--stage", default="base", help="a stage that trains")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="live-view-") as folder:
            command = [sys.executable, "-m", "runner.cli", str(options.recipe), "--cache", folder, "--until", options.stage]
            seconds, processor = watched(command)
        shares.append(processor / (seconds * cores))
        print(f"{processor:.2f} s of processor time in {seconds:.1f} s on {cores} cores: {shares[-1]:.2%}", flush=True)
    print(f"{statistics.median(shares):.2%} of the run")
    return int(statistics.median(shares) > LIMIT)


def watched(command: list[str]) -> tuple[float, float]:
    """Seconds from the first report of the training to its last, and processor seconds of the parent in that time."""
    child, screen = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process, looked, output = psutil.Process(child), 0.0, b""
    first: tuple[float, float] | None = None
    last = (0.0, 0.0)
    while True:
        try:
            data = os.read(screen, 1 << 16)
        except OSError:  # raised by Linux when the other end is closed
            break
        if not data:
            break
        output = output[-1000:] + data
        now = time.monotonic()
        if b"tokens/s" in output and now - looked >= POLL_SECONDS:
            looked, times = now, process.cpu_times()
            last = (now, times.user + times.system)
            first = first or last
    _, status = os.waitpid(child, 0)
    if first is None or os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"the run failed or reported no step: {output.decode(errors='replace')}")
    return last[0] - first[0], last[1] - first[1]


if __name__ == "__main__":
    sys.exit(main())
