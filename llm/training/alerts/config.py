"""Alerts as a recipe writes them: what is watched, its limits, and what is done about it. No torch, no judgement."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llm.training.config import ConfigTable

Action = Literal["off", "warn", "pause", "stop", "skip", "rollback"]
SLOWER = "A lower schedule.learning_rate or more schedule.warmup_steps usually helps"
FEWER = "It may be memorizing its rows: fewer steps, more rows or some dropout usually help"
ADVICE = {  # what a user may do about each alert
    "loss": f"{SLOWER}; where such a loss is expected, raise alerts.loss.above",
    "not_finite": SLOWER,
    "gradient_norm": f'{SLOWER}; alerts.gradient_norm.action = "skip" leaves such steps out',
    "validation": FEWER,
    "throughput": "Check what else runs on the machine",
    "gap": FEWER,
}


class Alert(ConfigTable):
    """One thing that is watched, and what is done about it."""

    if TYPE_CHECKING:  # a field here would come before those of the alerts
        action: Action  # each has it, with the actions that it allows

    def semantic_fields(self) -> dict[str, Any]:
        """The fields that decide what is learned: none, unless the action is `skip` or `rollback`."""
        if self.action == "rollback":
            return self.model_dump()
        return self.model_dump(exclude={"back"}) if self.action == "skip" else {}


class LossAlert(Alert):
    """The training loss is high, as the mean over a report."""

    above: float = 10.0
    """Nats per target."""
    after: int = Field(100, ge=0)
    """Steps before it is judged; at least those of the schedule's warm-up."""
    action: Literal["off", "warn", "pause", "stop", "rollback"] = "pause"
    """What is done about it."""
    back: int = Field(20, ge=0)
    """Of "rollback": how many steps before the offending ones are undone with them; the rows of all are skipped."""


class NotFiniteAlert(Alert):
    """The loss or the gradient of a step is not a finite number."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """What is done about it; to go on without any of these is useless."""
    back: int = Field(0, ge=0)
    """Of "rollback": how many steps before the offending one are undone with it; the rows of all are skipped."""


class GradientNormAlert(Alert):
    """The norm of the gradient, before clipping, is far above that of the last 50 steps."""

    times: float = Field(10.0, gt=1)
    """A multiple of the median of those norms."""
    action: Literal["off", "warn", "pause", "stop", "skip", "rollback"] = "warn"
    """What is done about it; "skip" leaves out the update of the step, counts it, and goes on."""
    back: int = Field(0, ge=0)
    """Of "rollback": how many steps before the offending one are undone with it; the rows of all are skipped."""


class ValidationAlert(Alert):
    """The validation loss rises."""

    rising: int = Field(3, gt=0)
    """Evaluations in a row, each with a higher loss than the one before."""
    action: Literal["off", "warn", "pause", "stop"] = "warn"
    """What is done about it."""


class ThroughputAlert(Alert):
    """Training is slow for at least a minute and three reports."""

    below: float = Field(0.3, gt=0, lt=1)
    """Share of the median speed since this run began."""
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
    code 5; `stop`, a failed stage; `skip`, no update from the step; `rollback`, back to a checkpoint before, without the rows.
    """

    loss: LossAlert = LossAlert()
    """The training loss is high."""
    not_finite: NotFiniteAlert = NotFiniteAlert()
    """The loss or the gradient of a step is not a finite number."""
    gradient_norm: GradientNormAlert = GradientNormAlert()
    """The norm of the gradient is suddenly high."""
    validation: ValidationAlert = ValidationAlert()
    """The validation loss rises."""
    throughput: ThroughputAlert = ThroughputAlert()
    """Training has become slow."""
    gap: GapAlert = GapAlert()
    """The validation loss is far above the training loss."""

    def semantic_fields(self) -> dict[str, Any]:
        """What decides what is learned, by alert: the fields of those whose action is `skip` or `rollback`."""
        return {name: fields for name, alert in self.each() if (fields := alert.semantic_fields())}

    def each(self) -> Iterator[tuple[str, Alert]]:
        """Name and alert."""
        return ((name, getattr(self, name)) for name in type(self).model_fields)

    def does(self, action: Action) -> bool:
        """Whether one of them has this action."""
        return any(alert.action == action for _, alert in self.each())

    @property
    def reach(self) -> int:
        """The most steps before an offending step or report that a rollback undoes, without those of the report itself."""
        return max((alert.back for alert in (self.loss, self.not_finite, self.gradient_norm)), default=0)
