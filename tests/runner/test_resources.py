"""How many cores a run uses."""

import os
from pathlib import Path

import pytest

from runner import resources
from runner.errors import RecipeError
from runner.resources import available_cores


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
