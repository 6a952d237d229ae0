"""`run stop RECIPE`: asks the run of a recipe to checkpoint and end."""

import argparse
import os
import signal
import sys
import time

from runner.cache.running import running
from runner.options import add_recipe_argument, store_of

LOOK_SECONDS = 0.2


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for it to end (default: 600)")


def main(options: argparse.Namespace) -> int:
    """Asks the runs of a recipe on this machine to checkpoint and end, as Ctrl-C does; exits with 1 if there is none."""
    cache = store_of(options).root
    pids = running(cache, options.recipe)
    if not pids:
        print(f"{options.recipe}: no run of it on this machine and this cache", file=sys.stderr)
        return 1
    for pid in pids:
        print(f"asking process {pid} to checkpoint and end", file=sys.stderr)
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + options.wait
    while left := set(running(cache, options.recipe)).intersection(pids):
        if time.monotonic() > end:
            print(f"still running: {', '.join(map(str, sorted(left)))}", file=sys.stderr)
            return 1
        time.sleep(LOOK_SECONDS)
    print("ended; the same `run` continues from there", file=sys.stderr)
    return 0
