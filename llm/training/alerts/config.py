"""Alerts as a recipe writes them."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from llm.training.config import ConfigTable

Action = Literal["off", "warn", "pause", "stop", "skip", "rollback"]
SLOWER = "A lower schedule.learning_rate or more schedule.warmup_steps usually helps"
FEWER = "It may be learning its rows by heart: fewer steps, more rows or some dropout usually help"
ADVICE = {  # what a person may do about each alert
    "loss": f"{SLOWER}; where such a loss is to be expected, raise alerts.loss.above",
    "not_finite": SLOWER,
    "gradient_norm": f'{SLOWER}; alerts.gradient_norm.action = "skip" leaves such steps out',
    "validation": FEWER,
    "throughput": "See what else the machine does",
    "gap": FEWER,
}


class Alert(ConfigTable):
    """One thing that is watched, and what is done about it."""

    @property
    def what_it_does(self) -> Action:
        """The action."""
        action: Action = self.action  # type: ignore[attr-defined]  # each has it, with the actions that it allows
        return action

    def learned(self) -> dict[str, Any]:
        """The fields that decide what is learned: none, unless the action changes it."""
        if self.what_it_does == "rollback":
            return self.model_dump()
        return self.model_dump(exclude={"back"}) if self.what_it_does == "skip" else {}


class LossAlert(Alert):
    """The training loss is high, as the mean over a report."""

    above: float = 10.0
    """Nats per target."""
    after: int = Field(100, ge=0)
    """Steps from which on it is judged; never before the end of the schedule's warm-up."""
    action: Literal["off", "warn", "pause", "stop", "rollback"] = "pause"
    """What is done about it."""
    back: int = Field(20, ge=0)
    """Of "rollback": steps before the offending ones that are undone, and their rows passed over, with them."""


class NotFiniteAlert(Alert):
    """The loss or the gradient of a step is not a finite number."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """What is done about it; going on as it is would be in vain."""
    back: int = Field(0, ge=0)
    """Of "rollback": steps before the offending one that are undone, and their rows passed over, with it."""


class GradientNormAlert(Alert):
    """The gradient's norm, before clipping, is far above what it was in the last 50 steps."""

    times: float = Field(10.0, gt=1)
    """The median of those norms."""
    action: Literal["off", "warn", "pause", "stop", "skip", "rollback"] = "warn"
    """What is done about it; "skip" leaves out the update of the step, counts it, and goes on."""
    back: int = Field(0, ge=0)
    """Of "rollback": steps before the offending one that are undone, and their rows passed over, with it."""


class ValidationAlert(Alert):
    """The validation loss rises."""

    rising: int = Field(3, gt=0)
    """Evaluations in a row, each with a higher loss than the one before."""
    action: Literal["off", "warn", "pause", "stop"] = "warn"
    """What is done about it."""


class ThroughputAlert(Alert):
    """Training has become slow, for a minute and three reports at least."""

    below: float = Field(0.3, gt=0, lt=1)
    """A share of the median speed since this run began."""
    action: Literal["off", "warn", "pause", "stop"] = "warn"
    """What is done about it."""


class GapAlert(Alert):
    """The validation loss is far above the training loss."""

    above: float = Field(1.0, gt=0)
    """Nats per target."""
    action: Literal["off", "warn", "pause", "stop"] = "warn"
    """What is done about it."""


class Alerts(ConfigTable):
    """What is watched while a training runs. Actions: `off`; `warn`; `pause`, a checkpoint and the end of the run with exit
    code 5; `stop`, a failed stage; `skip`, no update from the step; `rollback`, back to before, and past the rows.
    """

    loss: LossAlert = LossAlert()
    """The training loss is high."""
    not_finite: NotFiniteAlert = NotFiniteAlert()
    """The loss or the gradient of a step is not a finite number."""
    gradient_norm: GradientNormAlert = GradientNormAlert()
    """The gradient is suddenly long."""
    validation: ValidationAlert = ValidationAlert()
    """The validation loss rises."""
    throughput: ThroughputAlert = ThroughputAlert()
    """Training has become slow."""
    gap: GapAlert = GapAlert()
    """The validation loss is far above the training loss."""

    def learned(self) -> dict[str, Any]:
        """What of them decides what is learned: the alerts whose action is `skip` or `rollback`."""
        return {name: fields for name, alert in self.each() if (fields := alert.learned())}

    def each(self) -> Iterator[tuple[str, Alert]]:
        """Name and alert."""
        return ((name, getattr(self, name)) for name in type(self).model_fields)

    def does(self, action: Action) -> bool:
        """Whether one of them has this action."""
        return any(alert.what_it_does == action for _, alert in self.each())

    @property
    def reach(self) -> int:
        """Steps before a step or a report that a rollback undoes at most, with those of the report itself left aside."""
        return max((alert.back for alert in (self.loss, self.not_finite, self.gradient_norm)), default=0)
