"""Alerts on real trainings of seconds: what raises each, and that interruptions do not change what an action does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import POISONED, ROWS, VOCABULARY, MadeUpRows, PoisonedRows, poisoned, tiny_model, tiny_training
from torch import Tensor

from llm.data.batch import PackedRow
from llm.errors import InputError, Interrupted, Paused
from llm.training import checkpoint
from llm.training.alerts.config import Alerts
from llm.training.alerts.monitor import AlertMonitor, AlertState
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.runtime import limit_memory
from llm.training.step import Progress
from llm.training.task import CHECKPOINTS
from llm.training.validation import Validation

STEPS = 40


@dataclass(frozen=True)
class NoiseRows(MadeUpRows):
    """A few random rows, which can only be memorized."""

    rows_per_epoch: int = 5

    def row(self, index: int) -> PackedRow:
        row = super().row(index % self.rows_per_epoch)
        tokens = np.random.default_rng([self.seed, index % self.rows_per_epoch]).integers(VOCABULARY, size=self.context + 1)
        return PackedRow(tokens[:-1], tokens[1:], np.zeros_like(row.documents))


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def are_same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = weights(second)
    return all(torch.equal(weight, other[name]) for name, weight in weights(first).items())


def spiking(folder: Path, lines: list[dict[str, Any]], times: float = 1000.0, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A training whose gradient spikes at step 25; the model and the metrics."""
    model = tiny_model(dropout=0.1)
    settings: dict[str, Any] = {
        "rows": PoisonedRows(),
        "objective": poisoned(times),
        "budget": Budget(steps=STEPS),
        "validation": None,
        "optimizer": Optimizer(gradient_clip=0.0),
    }
    return model, tiny_training(model, folder, lines=lines, **(settings | changes))


def alerts(**tables: dict[str, Any]) -> Alerts:
    return Alerts.model_validate(tables)


def messages(lines: list[dict[str, Any]], alert: str) -> list[str]:
    return [line.get("note") or line["text"] for line in lines if line.get("alert") == alert]


def asked_at(step: int) -> Callable[[], bool]:
    """A `should_stop` that is true before step `step`, if nothing else calls it."""
    asked: Iterator[bool] = iter([False] * step + [True])
    return lambda: next(asked, False)


def test_a_gradient_spike_is_reported_with_its_step_and_a_warning_changes_nothing(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    warned, metrics = spiking(tmp_path / "warned", lines)
    unwatched, _ = spiking(tmp_path / "unwatched", [], alerts=alerts(gradient_norm={"action": "off"}))
    assert len(messages(lines, "gradient_norm")) == 1
    assert messages(lines, "gradient_norm")[0].startswith(f"warning: the gradient norm at step {POISONED} is ")
    assert metrics["alerts"] == {"raised": {"gradient_norm": 1}}
    assert are_same(warned, unwatched)


def test_a_skipped_step_does_not_update_and_is_counted_and_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    skip = alerts(gradient_norm={"action": "skip"}, not_finite={"action": "skip"})
    lines: list[dict[str, Any]] = []
    spiked, metrics = spiking(tmp_path / "spiked", lines, alerts=skip)
    broken, of_broken = spiking(tmp_path / "broken", [], times=math.nan, alerts=skip)
    assert metrics["alerts"]["skipped_steps"] == of_broken["alerts"]["skipped_steps"] == [POISONED]
    assert "it is skipped" in messages(lines, "gradient_norm")[0]
    assert are_same(spiked, broken)  # whatever it would have learned
    warned, _ = spiking(tmp_path / "warned", [])
    assert not are_same(spiked, warned)
    for step in (POISONED - 2, POISONED + 2):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            spiking(folder, [], alerts=skip, should_stop=asked_at(step))
        resumed, found = spiking(folder, [], alerts=skip)
        assert are_same(spiked, resumed) and found["alerts"] == metrics["alerts"] and found["loss"] == metrics["loss"]


def test_a_rollback_ends_as_if_the_offending_rows_had_not_been_there(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Without(MadeUpRows):
        """The same rows, without those of the steps from `first` to the poisoned one."""

        first: int = POISONED

        def row(self, index: int) -> PackedRow:
            gone = POISONED + 1 - self.first
            return PoisonedRows(steps=()).row(index if index < ROWS * self.first else index + ROWS * gone)

    for back in (0, 4):
        rollback = alerts(gradient_norm={"action": "rollback", "back": back})
        lines: list[dict[str, Any]] = []
        expected, _ = spiking(tmp_path / f"expected-{back}", [], rows=Without(first=POISONED - back))
        found, metrics = spiking(tmp_path / str(back), lines, alerts=rollback, every=10)
        assert are_same(expected, found)
        assert metrics["alerts"]["passed_over"] == [[POISONED - back, POISONED + 1]]
        assert metrics["alerts"]["rollbacks"] == [POISONED] and metrics["steps"] == STEPS
        assert [line for line in lines if f"goes back to step {20 if POISONED - back >= 20 else 10}" in line.get("note", "")]


def test_a_rollback_does_not_depend_on_checkpoints_and_interruptions(tmp_path: Path) -> None:
    rows = PoisonedRows(steps=(24, POISONED, 33))
    settings: dict[str, Any] = {
        "rows": rows,
        "alerts": alerts(not_finite={"action": "rollback", "back": 3}),
        "times": math.nan,
    }
    whole, metrics = spiking(tmp_path / "whole", [], **settings)
    # The rows of 25 come at step 21 once those of 21 to 24 are passed over, and those of 33 at step 25 after them.
    assert metrics["alerts"] == {"passed_over": [[18, 26], [30, 34]], "rollbacks": [24, 21, 25]}
    for step, every in ((22, None), (27, 1), (50, 2), (60, 7)):  # counted in steps taken, those undone among them
        folder = tmp_path / f"{step}"
        with pytest.raises(Interrupted):
            spiking(folder, [], **settings, every=every, should_stop=asked_at(step))
        resumed, found = spiking(folder, [], **settings, every=every)
        assert are_same(whole, resumed), step
        assert found["alerts"] == metrics["alerts"] and found["loss"] == metrics["loss"]


def test_a_loss_above_its_limit_pauses_after_a_checkpoint_and_only_once(tmp_path: Path) -> None:
    diverging: dict[str, Any] = {
        "schedule": Schedule(learning_rate=3.0, warmup_steps=3),  # absurdly high
        "alerts": alerts(loss={"above": 4.0, "after": 15}),
        "budget": Budget(steps=STEPS),
        "validation": None,
    }
    lines: list[dict[str, Any]] = []
    with pytest.raises(
        Paused,
        match=r"the alert 'loss': the loss over .* step 20 is .*above 4\. .* Checkpointed after step 20 of 40",
    ):
        tiny_training(tiny_model(), tmp_path / "paused", lines=lines, **diverging)
    assert [path.name for path in (tmp_path / "paused" / CHECKPOINTS).iterdir()] == ["step-00000020"]
    model, unwatched = tiny_model(), tiny_model()
    metrics = tiny_training(model, tmp_path / "paused", lines=lines, **diverging)
    assert metrics["steps"] == STEPS and metrics["alerts"]["raised"]["loss"] == 1
    tiny_training(unwatched, tmp_path / "unwatched", **(diverging | {"alerts": alerts(loss={"action": "off"})}))
    assert are_same(model, unwatched)
    stop = alerts(loss={"above": 4.0, "after": 15, "action": "stop"})
    with pytest.raises(InputError, match=r'alerts\.loss\.action is "stop"'):
        tiny_training(tiny_model(), tmp_path / "stopped", **(diverging | {"alerts": stop}))


def test_a_rising_validation_loss_and_a_gap_are_reported_once_each(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    tiny_training(
        tiny_model(),
        tmp_path,
        lines=lines,
        rows=NoiseRows(),  # learned by heart
        validation=Validation(NoiseRows(seed=1)),
        budget=Budget(steps=60),
        validate_every=10,
        schedule=Schedule(learning_rate=1e-2),
        alerts=alerts(validation={"rising": 2}, gap={"above": 0.5}),
    )
    assert len(messages(lines, "validation")) == 1 and "has risen 2 times in a row" in messages(lines, "validation")[0]
    assert len(messages(lines, "gap")) == 1 and "and the training loss" in messages(lines, "gap")[0]


def test_speed_that_stays_far_below_the_median_is_reported_once() -> None:
    monitor, state, steps = AlertMonitor(Alerts(), warmup_steps=0), AlertState(), range(9, 10)

    def told(speed: float, *, seconds: float = 25.0) -> list[str]:
        return [one.alert for one in monitor.report(state, steps, loss=1.0, speed=speed, seconds=seconds)]

    assert [told(speed) for speed in (100.0, 110.0, 90.0, 100.0, 100.0, 50.0)] == [[]] * 6
    assert [told(speed) for speed in (20.0, 29.0, 25.0, 25.0)] == [[], [], ["throughput"], []]
    assert [told(100.0), told(20.0, seconds=300.0), told(100.0)] == [[]] * 3  # the machine was stopped
    assert [told(20.0, seconds=1.0) for _ in range(4)] == [[]] * 4
    assert told(20.0, seconds=60.0) == ["throughput"]


def test_endless_skips_and_rollbacks_end_in_an_error(tmp_path: Path) -> None:
    always = PoisonedRows(steps=tuple(range(POISONED, 200)))
    for action, told in (("skip", "50 steps in a row were skipped"), ("rollback", "10 rollbacks before it did not help")):
        settings: dict[str, Any] = {"alerts": alerts(not_finite={"action": action}), "budget": Budget(steps=80)}
        with pytest.raises(InputError, match=told):
            spiking(tmp_path / action, [], times=math.nan, rows=always, every=5, **settings)


def test_only_alerts_that_change_what_is_learned_are_part_of_the_key() -> None:
    assert Alerts().semantic_fields() == {}
    assert alerts(loss={"above": 3.0, "action": "stop"}).semantic_fields() == {}
    assert alerts(gradient_norm={"times": 5.0, "action": "skip", "back": 9}).semantic_fields() == {
        "gradient_norm": {"times": 5.0, "action": "skip"}
    }
    assert alerts(not_finite={"action": "rollback"}).semantic_fields() == {"not_finite": {"action": "rollback", "back": 0}}


def test_the_skipped_rows_are_those_that_the_steps_saw() -> None:
    state = AlertState()
    state.pass_over(range(5, 7))
    assert [state.place(step) for step in range(4, 8)] == [4, 7, 8, 9]
    state.pass_over(range(6, 7))  # which saw the rows of 8
    assert [state.place(step) for step in range(4, 8)] == [4, 7, 9, 10]
    state.pass_over(range(4, 6))
    assert state.passed == [[4, 9]]
    assert [state.place(step) for step in range(3, 6)] == [3, 9, 10]
    assert Progress.of({"steps": 9, "alerts": vars(state)}).alerts == state


def test_the_last_checkpoints_are_kept_and_one_to_roll_back_to(tmp_path: Path) -> None:
    for kept in (1, 3):
        folder = tmp_path / str(kept)
        tiny_training(tiny_model(), folder, every=4, keep=kept, budget=Budget(steps=20), validation=None)
        assert [path.name for path in sorted((folder / CHECKPOINTS).iterdir())] == [
            f"step-{step:08d}" for step in (12, 16, 20)[-kept:]
        ]
    with checkpoint.Writer(tmp_path / "reach", kept=1, reach=5) as writer:
        for step in (0, 3, 6, 9, 12):
            writer.submit(checkpoint.take(tiny_model(), [], facts={"step": step}))
    assert [path.name for path in sorted((tmp_path / "reach").iterdir())] == [f"step-{step:08d}" for step in (6, 9, 12)]


def test_a_memory_limit_bounds_the_micro_batch_only_where_it_is_auto(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"budget": Budget(steps=3), "validation": None}
    whole, found = tiny_model(), tiny_model()
    assert tiny_training(whole, tmp_path / "whole", **settings)["choices"]["micro_batch"] == ROWS
    for name in ("short", "asked"):
        (tmp_path / name).mkdir()
        limit_memory(tmp_path / name, 2)
    assert tiny_training(found, tmp_path / "short", **settings)["choices"]["micro_batch"] == 2
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, weights(found)[name], atol=1e-6, rtol=0)
    assert tiny_training(tiny_model(), tmp_path / "asked", micro_batch=3, **settings)["choices"]["micro_batch"] == 3
