"""What errors of libraries mean that memory ran out, in their own words; and whether a GPU is asked for the same bits."""

import os

import pytest
import torch
from torch.utils import deterministic

from llm.device import ask_for_determinism, is_out_of_memory

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CUDNN = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
CUDNN_9 = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.3\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
ALLOCATION = "Failed to CUDA calloc 6291456 bytes"
MISUSE = "CUDA error: an illegal memory access was encountered"
PEER = "Connection closed by peer [127.0.0.1]:1672"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError(CUDA),
        torch.distributed.DistBackendError(NCCL + ALLOCATION),
        torch.distributed.DistBackendError(NCCL + "Cuda failure 2 'out of memory'"),
        *map(RuntimeError, (CUBLAS, CUDNN, CUDNN_9)),
    ],
    ids=lambda error: str(error)[:30],
)
def test_every_library_s_words_for_too_little_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(MISUSE),
        torch.distributed.DistBackendError(NCCL + "Cuda failure 'invalid argument'"),
        RuntimeError(PEER),
    ],
    ids=lambda error: str(error)[:30],
)
def test_other_faults_of_a_gpu_do_not_mean_too_little_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_allocator_of_main_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)


def test_only_a_gpu_is_asked_for_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), getattr(deterministic, "fill_uninitialized_memory")  # noqa: B009  # torch does not declare it
    try:
        ask_for_determinism(torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled() == before[0] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        ask_for_determinism(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before[0])
        setattr(deterministic, "fill_uninitialized_memory", before[1])  # noqa: B010  # torch does not declare it
