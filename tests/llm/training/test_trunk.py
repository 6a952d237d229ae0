"""Trainings in parts: a trunk that leaves its state in a folder, and what continues it, compared with one training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import VOCABULARY, MadeUpRows, tiny_model, tiny_training
from torch import Tensor

from llm.data.batch import Batch, PackedRow
from llm.errors import InputError, Interrupted
from llm.files import write_tensors
from llm.models.checkpoint import WEIGHTS
from llm.training import checkpoint
from llm.training.alerts.config import Alerts
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.loss import next_token_loss
from llm.training.task import CHECKPOINTS

RATE = {"learning_rate": 1e-2, "warmup_steps": 3}
WHOLE = {"budget": Budget(steps=27), "schedule": Schedule(kind="wsd", decay_steps=14, **RATE)}
SHAPE = {"dropout": 0.1}


def trunk(folder: Path, steps: int = 13, **changes: Any) -> dict[str, Any]:
    """Train for `steps` at a constant rate, and leave model and state in `folder`."""
    model = tiny_model(**SHAPE)
    settings = {"budget": Budget(steps=steps), "schedule": Schedule(kind="constant", **RATE), "leave_in": folder}
    folder.mkdir(exist_ok=True)
    metrics = tiny_training(model, folder / ".work", **settings | changes)
    write_tensors(folder / WEIGHTS, {name: weight.detach() for name, weight in model.named_parameters()})
    return metrics


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def ended(scratch: Path, steps: int = 27) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Counters, weights and optimizer of the last checkpoint; without the counters that differ between parts and whole."""
    state = checkpoint.read(scratch / CHECKPOINTS / f"step-{steps:08d}")
    own = ("seconds", "first_step", "first_tokens")
    return {name: value for name, value in state.facts["progress"].items() if name not in own}, state.weights, state.optimizer


def assert_equal(one: Path, other: Path) -> None:
    (counters, *tensors), (others_counters, *others_tensors) = ended(one), ended(other)
    assert counters == others_counters
    for mine, others in zip(tensors, others_tensors, strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize(
    ("kind", "precision", "compiled"),
    [
        ("adamw", "fp32", False),
        ("muon", "bf16", False),
        pytest.param("adamw", "bf16", True, marks=pytest.mark.long),
        pytest.param("muon", "fp32", True, marks=pytest.mark.long),
    ],
)
def test_a_trunk_and_its_decay_end_bit_for_bit_like_one_training(
    tmp_path: Path, kind: str, precision: str, compiled: bool
) -> None:
    settings: dict[str, Any] = {
        "optimizer": Optimizer.model_validate({"kind": kind}),
        "precision": precision,
        "compiled": compiled,
        "every": 27,
        "keep": 9,
    }
    expected = tiny_training(tiny_model(**SHAPE), tmp_path / "whole", **settings | WHOLE)
    trunk(tmp_path / "trunk", **settings)
    decay = settings | WHOLE | {"precision": "auto", "compiled": False}  # restored, and not chosen anew
    found = tiny_training(tiny_model(**SHAPE), tmp_path / "decay", start_from=tmp_path / "trunk", **decay)
    assert_equal(tmp_path / "whole", tmp_path / "decay")
    assert found["choices"] == expected["choices"] and found["first_step"] == 13
    assert {found[name] == expected[name] for name in ("loss", "validation_loss", "tokens", "targets", "steps")} == {True}
    assert found["flops"] == pytest.approx(expected["flops"] * 14 / 27)


def test_a_trunk_that_continues_a_shorter_one_leaves_the_same_bytes(tmp_path: Path) -> None:
    trunk(tmp_path / "long", 13)
    trunk(tmp_path / "short", 7)
    calls = iter(range(9))
    with pytest.raises(Interrupted, match="after step 8 of 13"):
        trunk(tmp_path / "longer", 13, start_from=tmp_path / "short", should_stop=lambda: next(calls) >= 3)
    metrics = trunk(tmp_path / "longer", 13, start_from=tmp_path / "short")
    assert left(tmp_path / "longer") == left(tmp_path / "long")
    assert left(tmp_path / "longer") != left(tmp_path / "short")
    assert metrics["first_step"] == 7 and metrics["steps"] == 13


@dataclass(frozen=True)
class MarkedRows(MadeUpRows):
    """Rows of which those of one step are marked by a first token that no other row has."""

    marked: int = 5
    rows_per_epoch: int = 1000

    def row(self, index: int) -> PackedRow:
        row = super().row(index)
        tokens = np.where(np.arange(self.context) == 0, VOCABULARY - 1 if index // 5 == self.marked else 0, row.tokens)
        return PackedRow(tokens, row.targets, row.documents)


def broken_where_marked(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    total, count, *_ = next_token_loss(model, batch)
    return total * torch.where((batch.tokens[:, 0] == VOCABULARY - 1).any(), torch.nan, 1.0), count


def test_rows_that_an_alert_skipped_in_the_trunk_are_skipped_in_the_decay(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rows": MarkedRows(),
        "objective": broken_where_marked,
        "alerts": Alerts.model_validate({"not_finite": {"action": "rollback", "back": 1}}),
        "every": 27,
    }
    expected = tiny_training(tiny_model(**SHAPE), tmp_path / "whole", **settings | WHOLE)
    trunk(tmp_path / "trunk", **settings)
    found = tiny_training(tiny_model(**SHAPE), tmp_path / "decay", start_from=tmp_path / "trunk", **settings | WHOLE)
    assert found["alerts"] == expected["alerts"] == {"passed_over": [[4, 6]], "rollbacks": [5]}
    assert_equal(tmp_path / "whole", tmp_path / "decay")


def test_a_rollback_does_not_go_back_into_the_trunk(tmp_path: Path) -> None:
    alerts = Alerts.model_validate({"not_finite": {"action": "rollback", "back": 5}})
    settings: dict[str, Any] = {"rows": MarkedRows(marked=15), "objective": broken_where_marked, "alerts": alerts}
    trunk(tmp_path / "trunk", **settings)
    found = tiny_training(tiny_model(**SHAPE), tmp_path / "decay", start_from=tmp_path / "trunk", **settings | WHOLE)
    assert found["alerts"]["passed_over"] == [[13, 16]]


def test_a_training_that_does_not_fit_its_trunk_is_refused(tmp_path: Path) -> None:
    trunk(tmp_path / "trunk")
    settings: dict[str, Any] = {"start_from": tmp_path / "trunk", **WHOLE}
    with pytest.raises(InputError, match=r"budget: expected more than the 13 steps .* got 13"):
        tiny_training(tiny_model(**SHAPE), tmp_path / "short", **settings | {"budget": Budget(steps=13)})
    with pytest.raises(InputError, match=r"optimizer\.kind: expected 'adamw'.* got 'muon'"):
        tiny_training(tiny_model(**SHAPE), tmp_path / "other", **settings | {"optimizer": Optimizer(kind="muon")})
