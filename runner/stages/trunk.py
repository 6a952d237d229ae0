"""The kind `trunk`: the part of a pretraining before its rate goes down, which longer ones and other decays go on from.

A trunk that is longer than one in the cache and otherwise the same goes on from it: what it learns does not depend on that.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from runner.artifacts import TrainingState
from runner.stage import Context, Metrics, Stage
from runner.stages.pretraining import Pretraining


class Trunk(Pretraining, kind="trunk", version=1, makes=TrainingState):
    """Trains a model from nothing at a rate that does not go down, and keeps what going on takes."""

    @model_validator(mode="after")
    def _open_ended(self) -> Self:
        if self.schedule.kind != "constant":
            raise ValueError(f'a trunk wants schedule.kind = "constant"; found {self.schedule.kind!r}')
        if self.budget.epochs is not None:
            raise ValueError("a trunk wants a budget of tokens or steps; found epochs")
        return self

    @property
    def holds_out(self) -> bool:
        """No: it looks at held-out rows only on its way."""
        return False

    def parted(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """Itself, with its budget in steps."""
        steps = self.steps(stages)
        return {name: self if steps is None else self.model_copy(update={"budget": type(self.budget)(steps=steps)})}

    def behind(self, mine: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """The steps of a shorter one; none where an alert may go back behind its end."""
        steps: int | None = other["fields"].get("budget", {}).get("steps")
        alike = {**other, "fields": {**other["fields"], "budget": mine["fields"]["budget"]}} == mine
        if steps is None or self.budget.steps is None or not alike or self.alerts.does("rollback"):
            return 0
        return steps if steps < self.budget.steps else 0

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint and what is kept beside it."""
        return self.learn_text(context, beginning=context.beginning, goes_on=True)
