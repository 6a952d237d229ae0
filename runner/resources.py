"""How many processor cores a run may use: what the process is allowed, unless STOCKPOT_CORES says how many."""

import math
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.errors import RecipeError
from runner.stage import Parallel

VARIABLE = "STOCKPOT_CORES"
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, or "max", per period


def available_cores() -> int:
    """Cores for the threads of all processes of a stage; raises RecipeError for a setting that is no such number."""
    if wanted := os.environ.get(VARIABLE):
        if not (wanted.isascii() and wanted.isdigit() and int(wanted)):
            raise RecipeError(f"{VARIABLE}: expected a number of cores, 1 or more, got {wanted!r}")
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


REPORTED_VERSIONS = (
    "stockpot",
    "torch",
    "tokenizers",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "rensa",
    "gguf",
    "xllamacpp",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in REPORTED_VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the stage ran on."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cores": available_cores()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def gpu_count() -> int:
    """GPUs that a training would see, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listing.stdout.count("GPU ") if listing.returncode == 0 else 0


def process_count(parallel: Parallel) -> int:
    """How many processes a training gets on this machine: as asked, else one per GPU, else one."""
    return max(gpu_count(), 1) if parallel.processes == "auto" else parallel.processes
