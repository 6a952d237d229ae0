"""What this machine offers: cores, GPUs and processes of a training, and the versions and hardware for the record."""

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

CORES_VARIABLE = "STOCKPOT_CORES"
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, or "max", per period
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


def available_cores() -> int:
    """Cores for the threads of all processes of a stage: STOCKPOT_CORES, else what this process may use.

    RecipeError if the variable is not a positive integer.
    """
    if text := os.environ.get(CORES_VARIABLE):
        if not (text.isascii() and text.isdigit() and int(text)):
            raise RecipeError(f"{CORES_VARIABLE}: expected a number of cores, 1 or more, got {text!r}")
        return int(text)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(allowed, _quota()))


def _quota() -> float:
    """The CPU limit of a container in cores, rounded up; infinity without a limit."""
    try:
        time, period = QUOTA.read_text(encoding="ascii").split()
        return math.inf if time == "max" else math.ceil(int(time) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def gpu_count() -> int:
    """The number of GPUs that a training would see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listing.stdout.count("GPU ") if listing.returncode == 0 else 0


def process_count(parallel: Parallel) -> int:
    """The number of processes of a training on this machine: `parallel.processes`, else one per GPU, else one."""
    return max(gpu_count(), 1) if parallel.processes == "auto" else parallel.processes


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    found = {package: version for package in REPORTED_VERSIONS if (version := version_of(package))}
    return {"python": platform.python_version(), **found}


def version_of(package: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def hardware() -> dict[str, Any]:
    """The machine, its cores, and its GPUs if torch is imported."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cores": available_cores()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found
