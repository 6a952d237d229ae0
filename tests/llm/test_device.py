"""What errors of libraries mean that memory ran out, in their own words; and whether a GPU is asked for the same bits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_model, tiny_training
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm import device
from llm.device import ask_for_determinism, is_out_of_memory, main_device, widest
from llm.inference.likelihood import Window, negative_log_likelihoods
from llm.inference.sampling import Sampling, distribution
from llm.inference.token_report import TokenReport, reporter
from llm.training.config import Budget

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


class WithoutFp64(TorchDispatchMode):
    """As Apple's GPU: no operation gives fp64."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{operation}: fp64")
        return out


def test_training_validation_scores_and_sampling_do_without_fp64_where_a_device_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU that is taken for such a device. Not yet run on one."""
    model = tiny_model()

    def everything() -> list[TokenReport]:
        tiny_training(model, tmp_path / "training", budget=Budget(steps=2), validate_every=1)
        negative_log_likelihoods(model, [Window([1, 2, 3], [2, 3, 4])])
        with torch.inference_mode():
            decoding, found = model.decoding(), list[TokenReport]()
            logits = decoding.read([[1, 2]], room=4)
            decoding.look_ahead(*torch.tensor([[[3, 4]], [[4, 5]], [[0, 0]]]))
            reporter(found, likeliest=2)(logits[0], 3)
            distribution(logits, Sampling(temperature=0.7, top_p=0.9))
        return found

    with WithoutFp64():
        with pytest.raises(TypeError, match="fp64"):
            everything()
        monkeypatch.setattr(device, "NARROW", {"cpu", "mps"})
        assert everything()[0].token == 3


def test_a_model_computes_on_a_gpu_or_where_asked_on_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOCKPOT_MPS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main_device().type == "cpu"  # nobody has run it there yet, so it has to be asked for
    monkeypatch.setenv("STOCKPOT_MPS", "1")
    assert main_device().type == "mps" and widest(main_device()) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="STOCKPOT_MPS: expected a Mac whose GPU torch can use, got none"):
        main_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main_device(1) == torch.device("cuda", 1) and widest(main_device()) == torch.float64
