"""Memory that runs out in one of two processes, which share no disk: they go on together, or end within seconds."""

from pathlib import Path
from typing import Any

import pytest
from short_of_memory import FORWARDS, STEPS, on_two_machines, run

from llm.training.runtime import MEMORY_LIMIT

AT_STEP_2 = FORWARDS + 2
LINGERS = 20.0  # seconds
SECONDS = 15.0  # on a busy machine; each process waits a minute for the other


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss of the same training in one process."""
    return float(run(tmp_path_factory.mktemp("alone"), {})["metrics"]["loss"])


def test_all_processes_take_fewer_rows_when_memory_runs_out_in_one(tmp_path: Path, alone: float) -> None:
    cases: dict[str, dict[str, Any]] = {
        "before": {"runs_out": "forward"},
        "forward": {"runs_out": "forward", "from": AT_STEP_2},  # in the only pass of a step, after which gradients are summed
        "accumulating": {"runs_out": "backward", "from": FORWARDS + 2, "rows": 8, "limit": 2},
        "validation": {"runs_out": "validation"},
    }
    found, errors, _ = on_two_machines(tmp_path, cases)
    assert all(found), errors
    first, second = found
    for name in cases:
        assert [one[name]["metrics"]["choices"]["micro_batch"] for one in found] == [1, 1], name
        assert first[name]["weights"] == second[name]["weights"]
    for name in ("before", "forward", "validation"):
        assert first[name]["metrics"]["loss"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        {"runs_out": "backward", "from": AT_STEP_2, "strategy": "ddp", "every": 1},  # the others sum gradients
        {"runs_out": "forward", "strategy": "fsdp"},  # before the first step; the others gather weights
    ],
    ids=["ddp", "fsdp"],
)
def test_all_processes_end_when_memory_runs_out_in_one_and_start_again_with_fewer_rows(
    tmp_path: Path, alone: float, case: dict[str, Any]
) -> None:
    _, errors, seconds = on_two_machines(tmp_path, {"case": case})
    assert seconds < SECONDS
    for error in errors:
        assert "MemoryShortageError: memory ran out" in error and "in process 1 of 2; micro_batch = 1 is next" in error
    (tmp_path / "0" / "case" / MEMORY_LIMIT).unlink()  # as if it had been lost: one process knows
    again, errors, _ = on_two_machines(tmp_path, {"case": case})
    assert all(again), errors
    for found in again:
        assert found["case"]["metrics"]["choices"]["micro_batch"] == 1
        assert found["case"]["metrics"]["loss"] == pytest.approx(alone, abs=1e-5)
        assert found["case"]["metrics"]["steps"] == STEPS


@pytest.mark.long
def test_a_process_that_waits_is_ended_though_the_one_that_failed_lives_on(tmp_path: Path) -> None:
    case = {"runs_out": "backward", "from": AT_STEP_2, "strategy": "ddp", "lingers": LINGERS}
    _, errors, seconds = on_two_machines(tmp_path, {"case": case})
    assert seconds > LINGERS / 2  # the one that waited was the first to end
    assert errors[0].endswith("micro_batch = 1 is next") and "ends, since memory ran out at step 2" in errors[0]
    assert (tmp_path / "0" / "case" / MEMORY_LIMIT).read_text().strip() == "1"
