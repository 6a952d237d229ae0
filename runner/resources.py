"""What this machine offers: cores, GPUs and processes of a training, and the versions and hardware for the record."""

import ctypes
import math
import os
import platform
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
    """The number of GPUs that a training would see: those of the driver that CUDA_VISIBLE_DEVICES leaves, without torch.

    Of GPUs that are cut into slices (MIG) a process sees one slice.
    """
    gpus = _gpus_of_the_driver()
    chosen = list(gpus) if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None else _visible(visible, list(gpus))
    sliced = any(gpus.get(uuid, True) for uuid in chosen)
    return min(len(chosen), 1) if sliced else len(chosen)


def _visible(setting: str, uuids: list[str]) -> list[str]:
    """What CUDA takes of a setting: numbers, or UUIDs or their beginnings, up to the first that names nothing."""
    chosen: list[str] = []
    for name in (part.strip() for part in setting.split(",")):
        if name.startswith("MIG-") and uuids:
            found = [name]
        elif name.isascii() and name.isdigit():
            found = uuids[int(name) : int(name) + 1]
        else:
            found = [uuid for uuid in uuids if name.startswith("GPU-") and uuid.startswith(name)]
        if len(found) != 1:
            break
        chosen += found
    return chosen if len(set(chosen)) == len(chosen) else []  # CUDA refuses a GPU that is named twice


def _gpus_of_the_driver() -> dict[str, bool]:
    """The UUID of each GPU, and whether it is cut into slices; none without a driver."""
    try:
        ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")  # saves the import below
    except OSError:
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {_text(pynvml.nvmlDeviceGetUUID(handle)): _is_sliced(handle) for handle in handles}
    except pynvml.NVMLError:
        return {}


def _is_sliced(handle: Any) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # a GPU that cannot be cut
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes from old drivers


def process_count(parallel: Parallel, *, gpus: int | None = None) -> int:
    """The number of processes of a training on a machine with `gpus`, by default this one: `parallel.processes`, else one per
    GPU, else one.
    """
    return max(gpu_count() if gpus is None else gpus, 1) if parallel.processes == "auto" else parallel.processes


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
