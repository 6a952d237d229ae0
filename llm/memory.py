"""How much memory this process has used at most, how much is left, and what it looks like when there is none."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on "cuda", else of the process since it started, with what it shares with the process that
    forked it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def free_memory(device: torch.device) -> float:
    """Bytes still to be had: of a GPU; or of main memory, by the machine, its container and this process's own limit."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's, handed to nobody
        return float(torch.cuda.mem_get_info(device)[0] + idle)
    limits = [float("inf")]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: then there is no limit
        limits.append(float((_CGROUP / "memory.max").read_text()) - float((_CGROUP / "memory.current").read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            limits.append(float(soft - used))
    return max(0.0, min(limits))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; torch has a type of its own only for the memory of a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "could not create a memory")
    )
