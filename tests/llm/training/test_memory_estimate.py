"""Memory that a training would need is known before a full row is computed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from limited_memory import memory_left
from tiny_training import MadeUpRows, tiny_model, tiny_training
from torch import Tensor

from llm.data.batch import Batch
from llm.errors import InputError
from llm.training.config import Budget
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches
from llm.training.loss import Learner, next_token_loss
from llm.training.preflight import memory_estimate

CONTEXT = 2**19


@dataclass
class Longest:
    """The loss, and the longest row that it was asked for."""

    positions: int = 0

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        self.positions = max(self.positions, batch.tokens.shape[1])
        return next_token_loss(model, batch)


@pytest.mark.parametrize("micro_batch", ["auto", 1])
def test_a_row_that_cannot_fit_is_refused_before_it_is_computed(micro_batch: int | str, tmp_path: Path) -> None:
    objective = Longest()
    changes = {"objective": objective, "rows": MadeUpRows(context=CONTEXT), "batch_tokens": CONTEXT, "validation": None}
    tiny_training(tiny_model(), tmp_path / "first", budget=Budget(steps=1))  # whatever torch takes once, it has taken
    before, began = psutil.Process().memory_info().rss, time.process_time()
    with memory_left(2**30), pytest.raises(InputError) as refused:
        tiny_training(tiny_model(context=CONTEXT), tmp_path / "second", micro_batch=micro_batch, **changes)
    assert time.process_time() - began < 2
    assert psutil.Process().memory_info().rss - before < 2**28
    assert objective.positions <= memory_estimate.MEASURED_WHOLE
    said = str(refused.value)
    assert said.startswith(f"1 row of {CONTEXT} positions: expected a training step within the ")
    assert "GiB of memory that are free, got a need of about " in said
    assert said.endswith("; recompute = true, a shorter context or a smaller architecture needs less")


def test_rows_that_do_not_fit_together_are_refused_unless_their_number_is_auto(tmp_path: Path) -> None:
    rows = MadeUpRows(context=2048)
    changes = {"rows": rows, "batch_tokens": 128 * 2048, "validation": None, "budget": Budget(steps=1)}
    tiny_training(tiny_model(), tmp_path / "first", budget=Budget(steps=1))
    with (
        memory_left(2**28),
        pytest.raises(InputError, match=r'^64 rows of 2048 positions: .* micro_batch = "auto", a shorter'),
    ):
        tiny_training(tiny_model(context=2048), tmp_path / "second", micro_batch=64, **changes)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_short_rows_foretell_is_what_a_long_one_keeps(recompute: bool) -> None:
    model = tiny_model(context=4096)
    model.recompute = recompute
    learner, rows, group = Learner(model, next_token_loss, precision="fp32"), MadeUpRows(context=4096), ProcessGroup()
    foretold = memory_estimate._row_bytes(learner, rows, group=group)
    kept = memory_estimate._kept_for_backward(learner, next(batches(rows, range(1), 1)))
    assert foretold == pytest.approx(kept, rel=0.05)
