"""Compares what steps, reports and validations show with the limits of the alerts. Numbers only, no torch.

The training loop acts on what is found. An action that changes what is learned (`skip`, `rollback`) depends only on the rows,
the settings and the seed, so an interrupted training decides as an uninterrupted one does. An alert is raised once, and again
only after its cause ended: a training that goes on after a pause does not pause for the same cause again.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from llm.errors import InputError
from llm.training.alerts.config import ADVICE, Action, Alert, Alerts

NORMS = 50  # steps whose gradient norms give the running median
LEAST_NORMS = 20  # steps before one is judged by it
SPEEDS = 5  # reports before one is judged by the speed of those before
SLOW_REPORTS, SLOW_SECONDS = 3, 60.0  # in a row, and together: less may be a pause of the machine
MOST_SKIPPED = 50  # steps in a row; by then the running median has adapted, so it is not a spike
MOST_ROLLBACKS = 10  # of one training


@dataclass(frozen=True)
class Finding:
    """One alert that was raised."""

    alert: str
    action: Action
    text: str
    steps: range  # the offending ones, counted from 0
    back: int = 0  # steps before them to undo as well

    @property
    def advice(self) -> str:
        """What a user may do about it, as a sentence without its full stop."""
        return ADVICE[self.alert]


class RollBack(Exception):  # noqa: N818  # it is no error
    """Training goes on from before the offending steps, without their rows."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding
        self.steps = range(max(0, finding.steps.start - finding.back), finding.steps.stop)


SEVERITY: dict[Action, int] = {"rollback": 0, "stop": 1, "pause": 2, "skip": 3, "warn": 4, "off": 5}


def most_severe(findings: Iterable[Finding]) -> Finding | None:
    """What decides how a training goes on: a rollback first, since the rest may be about steps that it undoes."""
    return min(findings, key=lambda finding: (SEVERITY[finding.action], finding.steps.start), default=None)


@dataclass
class AlertState:
    """What alerts remember of a training; JSON values only, because it is part of every checkpoint."""

    norms: list[float] = field(default_factory=list)  # gradient norms of the last steps
    raised: list[str] = field(default_factory=list)  # alerts whose cause has not ended
    rising: int = 0  # validations in a row
    validation_loss: float | None = None  # the last
    skipped: list[int] = field(default_factory=list)  # steps without an update
    passed: list[list[int]] = field(default_factory=list)  # [first, end) of steps whose rows are skipped, sorted, apart
    rollbacks: list[int] = field(default_factory=list)  # the first offending step of each
    counts: dict[str, int] = field(default_factory=dict)  # how often each alert was raised

    def place(self, step: int) -> int:
        """The step whose rows `step` learns from: itself, moved on by the ranges that are skipped."""
        for first, end in self.passed:
            if step >= first:
                step += end - first
        return step

    def pass_over(self, steps: range) -> None:
        """Skip the rows that `steps` learned from, from now on."""
        new = [self.place(steps.start), self.place(steps.stop - 1) + 1]
        apart = [kept for kept in self.passed if kept[1] < new[0] or kept[0] > new[1]]
        touched = [kept for kept in self.passed if kept not in apart]
        merged = [min(new[0], *(kept[0] for kept in touched)), max(new[1], *(kept[1] for kept in touched))] if touched else new
        self.passed = sorted([*apart, merged])

    def facts(self) -> dict[str, Any]:
        """What a record says of it; empty if there is nothing."""
        found = {
            "raised": self.counts,
            "skipped_steps": self.skipped,
            "passed_over": self.passed,
            "rollbacks": self.rollbacks,
        }
        return {name: value for name, value in found.items() if value}


class AlertMonitor:
    """The alerts of one training, and the speeds of this run; what outlives the run is in the AlertState."""

    def __init__(self, alerts: Alerts, *, warmup_steps: int) -> None:
        self.alerts = alerts
        self._warmup = warmup_steps
        self._speeds: list[float] = []  # of this run alone: another machine has other ones
        self._slow: list[float] = []  # seconds of the last reports in a row that were slow

    @property
    def each_step(self) -> bool:
        """Whether each step is judged before its update; this waits for its gradient."""
        return self.alerts.does("skip")

    def step(self, state: AlertState, step: int, *, loss: float, norm: float, rate: float) -> Finding | None:
        """Judge a step; steps come in order. Where the action found is `skip`, the step must not update."""
        finding = self._of_step(state, step, loss=loss, norm=norm, rate=rate)
        if math.isfinite(norm):
            state.norms = [*state.norms, norm][-NORMS:]
        if finding is None or finding.action != "skip":
            return finding
        state.skipped.append(step)
        if state.skipped[-MOST_SKIPPED:] == list(range(step - MOST_SKIPPED + 1, step + 1)):
            raise InputError(f"{MOST_SKIPPED} steps in a row were skipped, the last because {finding.text}")
        return finding

    def _of_step(self, state: AlertState, step: int, *, loss: float, norm: float, rate: float) -> Finding | None:
        this = range(step, step + 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            text = (
                f"training: expected a finite loss and gradient, got at step {step}: loss {loss:g}, gradient norm {norm:g}, "
                f"learning rate {rate:g}"
            )
            alert = self.alerts.not_finite
            state.counts["not_finite"] = state.counts.get("not_finite", 0) + 1
            return Finding("not_finite", alert.action, text, this, alert.back)
        spiky = self.alerts.gradient_norm
        usual = median(state.norms) if len(state.norms) >= LEAST_NORMS else math.inf
        spike = norm > spiky.times * usual
        text = f"the gradient norm at step {step} is {norm:.4g}, and the median of the last {len(state.norms)} is {usual:.4g}"
        return next(self._raised(state, "gradient_norm", spike, spiky, text, this, spiky.back), None)

    def report(
        self, state: AlertState, steps: range, *, loss: float | None, speed: float, seconds: float
    ) -> Iterator[Finding]:
        """Judge the mean loss of `steps` (None: all were skipped), and the speed in tokens/s over `seconds`."""
        alert = self.alerts.loss
        judged = steps.stop > max(self._warmup, alert.after)
        if loss is not None:
            text = f"the loss over the {len(steps)} steps before step {steps.stop} is {loss:.4g}, above {alert.above:g}"
            yield from self._raised(state, "loss", judged and loss > alert.above, alert, text, steps, alert.back)
        slow = self.alerts.throughput
        usual = median(self._speeds) if len(self._speeds) >= SPEEDS else 0.0
        if speed < slow.below * usual:  # a slow report is not part of what is usual
            self._slow.append(seconds)
        else:
            self._slow, self._speeds = [], [*self._speeds, speed][-NORMS:]
        lasting = len(self._slow) >= SLOW_REPORTS and sum(self._slow) >= SLOW_SECONDS
        text = f"at step {steps.stop} training makes {speed:,.0f} tokens/s, and {usual:,.0f} was usual"
        yield from self._raised(state, "throughput", lasting, slow, text, steps)

    def validation(self, state: AlertState, step: int, *, found: float, loss: float | None) -> Iterator[Finding]:
        """Judge the loss on held-out rows, `found`, by the last one and the training loss."""
        before, state.validation_loss = state.validation_loss, found
        state.rising = state.rising + 1 if before is not None and found > before else 0
        alert, steps = self.alerts.validation, range(step, step)
        text = f"the validation loss has risen {state.rising} times in a row, to {found:.4g} after step {step}"
        yield from self._raised(state, "validation", state.rising >= alert.rising, alert, text, steps)
        gap = self.alerts.gap
        wide = loss is not None and found - loss > gap.above
        text = f"after step {step} the validation loss is {found:.4g} and the training loss {loss or 0.0:.4g}"
        yield from self._raised(state, "gap", wide, gap, text, steps)

    def _raised(
        self, state: AlertState, name: str, found: bool, alert: Alert, text: str, steps: range, back: int = 0
    ) -> Iterator[Finding]:
        """The finding, if there is one: only the first of the same cause, unless the action is taken each time."""
        found = found and alert.action != "off"
        before = name in state.raised
        if found != before:
            state.raised = sorted({*state.raised, name} if found else {*state.raised} - {name})
        if found and (not before or alert.action in ("skip", "rollback")):
            state.counts[name] = state.counts.get(name, 0) + 1
            yield Finding(name, alert.action, text, steps, back)
