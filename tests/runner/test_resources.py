"""How many cores and GPUs a run uses."""

import ctypes
import os
from pathlib import Path

import pynvml
import pytest

from runner import resources
from runner.errors import RecipeError
from runner.resources import available_cores, gpu_count


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOCKPOT_CORES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8), ("nonsense", 8), ("1 0", 8)],
)
def test_cores_are_limited_by_affinity_and_by_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, wanted: int
) -> None:
    monkeypatch.setattr(resources, "QUOTA", tmp_path / "cpu.max")
    assert available_cores() == 8  # no such file
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores() == wanted


def test_the_variable_sets_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKPOT_CORES", "3")
    assert available_cores() == 3


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5", "²"])
def test_an_invalid_number_of_cores_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("STOCKPOT_CORES", wrong)
    with pytest.raises(RecipeError, match=f"^STOCKPOT_CORES: expected a number of cores, 1 or more, got '{wrong}'$"):
        available_cores()


LAPTOP = [("GPU-5a1b", "NVIDIA GeForce RTX 4070 Laptop GPU", False)]
TWO = [("GPU-aa01", "NVIDIA H200", False), ("GPU-bb02", "NVIDIA H200", False)]
SLICED = [("GPU-aa01", "NVIDIA A100", True), ("GPU-bb02", "NVIDIA A100", True)]


def with_driver(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str, bool]]) -> None:
    """A driver that lists these GPUs: UUID, name, and whether it is cut into slices. No GPU is at hand here."""

    def mig_mode(index: int) -> tuple[int, int]:
        if gpus[index][2]:
            return 1, 1
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(gpus))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda index: gpus[index][0])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", mig_mode)


@pytest.mark.parametrize(
    ("gpus", "visible", "count"),
    [
        (LAPTOP, None, 1),
        (LAPTOP, "0", 1),
        (LAPTOP, "1", 0),
        (TWO, None, 2),
        (TWO, "", 0),
        (TWO, "-1", 0),
        (TWO, "1", 1),
        (TWO, "1,0", 2),
        (TWO, "0,7,1", 1),  # what follows a number that is not there does not count
        (TWO, "0,0", 0),
        (TWO, "GPU-bb", 1),
        (TWO, "GPU-aa01,GPU-bb02", 2),
        (TWO, "GPU-cc", 0),
        (SLICED, None, 1),
        (SLICED, "MIG-1f,MIG-2e", 1),
        (SLICED, "0,1", 1),
        ([], None, 0),
        ([], "0", 0),
    ],
)
def test_gpus_are_those_of_the_driver_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str, bool]], visible: str | None, count: int
) -> None:
    with_driver(monkeypatch, gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == count


def test_a_driver_that_does_not_answer_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    with_driver(monkeypatch, TWO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    assert gpu_count() == 0
