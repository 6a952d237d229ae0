"""What the live view costs: the processor time of the process that shows a training, beside that of the whole machine.

    python -m runner.diagnostics.live_view_cost [RECIPE] [--stage base] [--rounds 3]

Runs the stage with what it needs on an empty cache, on a terminal of 120 columns, and counts what the process that a user
started takes from the first report of the training to its last: the view, and waiting for the workers, which do all else. It
may take 1% of the time of all cores. Not a test: it judges the machine, too.
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
LOOK_SECONDS = 0.2
MOST = 0.01  # of the run


def main() -> int:
    """Prints the shares; exits with 1 if the median is over MOST."""
    parser = argparse.ArgumentParser(description="What the live view costs a training.")
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--stage", default="base", help="a training")
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
    return int(statistics.median(shares) > MOST)


def watched(command: list[str]) -> tuple[float, float]:
    """Seconds from the first report of the training until it ends, and processor seconds of the parent meanwhile."""
    child, screen = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process, looked, told = psutil.Process(child), 0.0, b""
    first: tuple[float, float] | None = None
    last = (0.0, 0.0)
    while True:
        try:
            data = os.read(screen, 1 << 16)
        except OSError:  # Linux says so where the other end is closed
            break
        if not data:
            break
        told = told[-1000:] + data
        now = time.monotonic()
        if b"tokens/s" in told and now - looked >= LOOK_SECONDS:
            looked, times = now, process.cpu_times()
            last = (now, times.user + times.system)
            first = first or last
    _, status = os.waitpid(child, 0)
    if first is None or os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"the run failed or reported no step: {told.decode(errors='replace')}")
    return last[0] - first[0], last[1] - first[1]


if __name__ == "__main__":
    sys.exit(main())
