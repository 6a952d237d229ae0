"""What the live view costs: the processor time of the process that shows a training, on a terminal and without one.

    python tests/live_view_cost.py [RECIPE] [--stage base] [--rounds 3]

Runs the stage with what it needs on an empty cache, in turns on a terminal of 120 columns and into a file, and counts what the
process that a user started takes from the first report of the training to its last. All else is done by other processes. The
view may take 1% of the run: of the time of all cores that the training has.
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

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
ROWS, COLUMNS = 40, 120
LOOK_SECONDS = 0.2


def main() -> int:
    """Prints the shares; 1 if the view takes over 1%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--stage", default="base", help="a training")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares: dict[str, list[float]] = {"terminal": [], "file": []}
    for _ in range(options.rounds):
        for name in shares:
            with tempfile.TemporaryDirectory(prefix="live-view-") as folder:
                command = [sys.executable, "-m", "runner.cli", str(options.recipe), "--cache", folder]
                seconds, processor = watched([*command, "--until", options.stage], on_terminal=name == "terminal")
            shares[name].append(processor / (seconds * cores))
            print(f"{name}: {processor:.2f} s of processor time in {seconds:.1f} s on {cores} cores: {shares[name][-1]:.2%}")
    whole = {name: statistics.median(found) for name, found in shares.items()}
    print(f"the parent takes {whole['terminal']:.2%} with the live view, {whole['file']:.2%} without")
    return int(whole["terminal"] > 0.01)


def watched(command: list[str], *, on_terminal: bool) -> tuple[float, float]:
    """Seconds from the first report of the training until it ends, and processor seconds of the parent meanwhile."""
    child, screen = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        if not on_terminal:
            reader, writer = os.pipe()
            if os.fork():  # this process has the command's number and becomes it; the other only passes lines on
                os.close(reader)
                os.dup2(writer, 2)
                os.execvp(command[0], command)
            os.close(writer)
            while data := os.read(reader, 1 << 16):
                os.write(1, data)
            os._exit(0)
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
