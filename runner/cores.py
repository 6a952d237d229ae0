"""How many processor cores a run may use: what the process is allowed, unless STOCKPOT_CORES says how many."""

import math
import os
from pathlib import Path

from runner.errors import RecipeError

VARIABLE = "STOCKPOT_CORES"
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, or "max", per period


def available_cores() -> int:
    """Cores for the threads of all processes of a stage; raises RecipeError for a setting that is no such number."""
    if wanted := os.environ.get(VARIABLE):
        if not (wanted.isascii() and wanted.isdigit() and int(wanted)):
            raise RecipeError(f"{VARIABLE}: found {wanted!r}, wants a number of cores, 1 or more")
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(allowed, _quota()))


def _quota() -> float:
    """Cores that a container may keep busy, rounded up; infinity where nothing limits them."""
    try:
        time, period = QUOTA.read_text(encoding="ascii").split()
        return math.inf if time == "max" else math.ceil(int(time) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
