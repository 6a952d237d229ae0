"""This machine as training sees it: memory, precision, compiler."""

import contextlib
import ctypes
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor
from torch.utils import deterministic

Precision = Literal["fp32", "bf16"]

MPS = "STOCKPOT_MPS"  # "1" computes on Apple's GPU
NARROW = {"mps"}  # kinds of devices without fp64

M_MMAP_THRESHOLD = -3  # of mallopt(3)
_CGROUP = Path("/sys/fs/cgroup")


def main_device(index: int = 0) -> torch.device:
    """Where a model computes: the GPU of that number, else Apple's where STOCKPOT_MPS asks for it, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", index)
    if os.environ.get(MPS) == "1":
        if not torch.backends.mps.is_available():
            raise ValueError(f"{MPS}: expected a Mac whose GPU torch can use, got none")
        return torch.device("mps")
    return torch.device("cpu")


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums of many numbers: fp64 where the device has it."""
    return torch.float32 if device.type in NARROW else torch.float64


def widened(x: Tensor) -> Tensor:
    """x in the widest dtype of its device."""
    return x.to(widest(x.device))


def has_compiler(device: str) -> bool:
    """Whether this machine has what torch.compile needs: a C++ compiler for a CPU, Triton for a GPU."""
    return util.find_spec("triton") is not None if device == "cuda" else find_compiler() is not None


def find_compiler() -> str | None:
    """The path of a C++ compiler: CXX, else g++ or clang++; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], *, device: torch.device) -> Precision:
    """The precision to use; "auto" is bf16 where the hardware multiplies it faster than fp32, without emulation.

    Measured on a 2-core AVX512-BF16 machine: products of the sizes of hidden 192 to 512 reach 850 to 1,070 GFLOP/s in bf16 and
    220 to 240 in fp32; whole training steps are 2.5 to 3.4 times as fast.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
    return "fp32"


def autocast(precision: Precision, *, device: torch.device) -> torch.autocast:
    """The context in which a forward pass runs; weights stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def ask_for_determinism(device: torch.device) -> None:
    """Ask a GPU for the same bits each time, as far as it can: called before its first matrix product.

    Operations without a deterministic form warn and run. A CPU computes the same bits anyway. For cuBLAS's workspace see
    https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # it costs time; torch does not declare it


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on "cuda", else of the process since it started, pages shared with its parent included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def free_memory(device: torch.device) -> float:
    """Bytes still available: on a GPU; or in main memory, within the machine, its container and this process's own limit."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by the allocator, unused
        return float(torch.cuda.mem_get_info(device)[0] + idle)
    limits = [float(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError):  # "max", which is not a number, means no limit
        limits.append(float((_CGROUP / "memory.max").read_text()) - float((_CGROUP / "memory.current").read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(float(soft - psutil.Process().memory_info().vms))
    return max(0.0, min(limits))


def return_freed_blocks() -> None:
    """From now on give blocks of 1 MiB and more back to the system when they are freed, where the C library is glibc.

    For work that goes over a model weight by weight: glibc before 2.38 does not use an aligned block that was freed for the
    next one, and merging an adapter into 128 MB of weights left 75 MB behind.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


# What libraries say when memory runs out, in an error that has no type of its own: torch's allocator of main memory, oneDNN,
# cuBLAS, cuDNN, cuSOLVER, cuSPARSE, CUDA itself, and NCCL,
# which repeats the error of CUDA. https://docs.nvidia.com/cuda/cublas/#cublasstatus-t and the same tables of the others
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "could not create a memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
    "DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "out of memory",
    "Failed to CUDA calloc",
    "Failed to CUDA host alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out; torch has an exception type for that only where its own allocator says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # AcceleratorError and torch.distributed's errors are RuntimeErrors.
    return isinstance(error, RuntimeError) and any(words.lower() in str(error).lower() for words in OUT_OF_MEMORY)


def seconds_per_call(call: Callable[[], object], *, device: torch.device, calls: int = 1) -> float:
    """Seconds that one of `calls` takes, until the device has finished."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def release_cached_memory(device: torch.device) -> None:
    """Give back what the allocator of a GPU keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
