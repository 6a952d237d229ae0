"""The steps of one training: forward and backward passes, the update, and what is reported of them."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from llm.data.batch import Batch
from llm.device import is_out_of_memory
from llm.errors import InputError, Paused
from llm.layers.dropout import set_counters
from llm.training.alerts.monitor import AlertMonitor, AlertState, Finding, RollBack, most_severe
from llm.training.distributed.fsdp import full_tensor
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loss import Learner
from llm.training.mfu import peak_flops
from llm.training.optim.optimizer import build_optimizers, set_learning_rate
from llm.training.preflight.dry_run import shortage, smaller
from llm.training.runtime import Runtime
from llm.training.task import TrainingTask
from llm.training.validation import Validation, validation_losses

LOG_EVERY = 10  # steps between two reports


@dataclass
class Progress:
    """How far a training has come; JSON values only, because it is part of every checkpoint."""

    steps: int
    step: int = 0  # finished
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0  # over all runs
    recent: list[float] = field(default_factory=list)  # losses of the steps since the last report
    loss: float | None = None  # mean over the steps of the last report
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    best: dict[str, float] = field(default_factory=dict)  # the one with the lowest loss
    self_check: dict[str, float] = field(default_factory=dict)
    reported: int = 0  # step of the last report
    first_step: int = 0  # where it began: another training took the steps before
    first_tokens: int = 0  # positions that the other computed
    alerts: AlertState = field(default_factory=AlertState)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Self:
        """The progress that a checkpoint keeps."""
        return cls(**(facts | {"alerts": AlertState(**facts["alerts"])}))


class Loop:
    """One training's modules and optimizers, and what its steps have left to report."""

    def __init__(
        self,
        learner: Learner,  # as `llm.training.distributed.fsdp.shard` returns it
        task: TrainingTask,
        runtime: Runtime,
        *,
        auto: bool,  # whether the micro-batch may be made smaller
        group: ProcessGroup,
        flops_per_token: float,  # forward and backward
        report: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.learner, self.model, self.group = learner, learner.model, group
        self.runtime, self.auto = runtime, auto
        self.loaded = runtime.micro_batch  # rows of the batches that come; the runtime's may become fewer
        self.report, self.should_stop = report, should_stop
        self.schedule, self.seed = task.schedule, task.seed
        self.monitor = AlertMonitor(task.alerts, warmup_steps=task.schedule.warmup_steps)
        self.flops_per_token = flops_per_token
        self.clip = task.optimizer.gradient_clip or math.inf
        self.optimizers = build_optimizers(
            self.model, task.optimizer, schedule=task.schedule, muon_precision=runtime.muon_precision
        )
        self.wrapped = group.wrap(learner, runtime.strategy)
        # Whether a process may compute only when all do: to gather weights, or to tell each other which weights were used.
        self.together = runtime.strategy == "fsdp" or (runtime.strategy == "ddp" and group.find_unused_parameters)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._losses: list[Tensor] = []  # of steps not yet collected: this process's share
        self._norms: list[Tensor] = []
        self._found: list[Finding] = []  # about steps, not yet acted upon
        self._norm = 0.0  # of the last step collected
        self._since = time.monotonic()
        self._tokens = 0  # of this process, since then
        self._peak: dict[str, float] | None = None  # what goes into the next report, once

    def step(self, progress: Progress, parts: list[Batch], *, targets: float, rounds: int) -> None:
        """One optimizer step over this process's micro-batches; `targets` is their number over all processes,
        by their weights.

        No process has more micro-batches than `rounds`. A process with fewer starts later, so that all compute their last one,
        which sums the gradients, together; before each round they may agree to stop.
        """
        self.wrapped.train()
        if self.runtime.micro_batch < self.loaded:
            parts = [piece for part in parts for piece in part.split(self.runtime.micro_batch)]
            rounds = int(self.group.max(len(parts))[0])
        context = parts[0].tokens.shape[1]
        alone = False  # the others may be waiting for this process in the middle of a step
        try:
            loss = self._accumulate(progress, parts, targets=targets, rounds=rounds)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            loss, alone = None, self.group.size > 1
        if loss is None:  # outside of the handler, nothing holds what the failed attempt computed
            self.learner.zero_grad()
            self._take_less(f"at step {progress.step}", context=context, alone=alone)
            self.step(progress, parts, targets=targets, rounds=rounds)
            return
        try:
            self._update(progress, loss / (targets or 1.0))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._take_less(f"in the update of step {progress.step}", context=context, alone=True)  # a part may be done
        self._tokens += sum(part.tokens.numel() for part in parts)

    def _take_less(self, when: str, *, context: int, alone: bool) -> None:
        """Go on with a smaller micro-batch, in all processes; raise a MemoryShortageError where this one is `alone`."""
        runtime = self.runtime
        if alone:
            raise shortage(when, runtime, auto=self.auto, group=self.group, context=context)
        self.runtime = replace(runtime, micro_batch=smaller(runtime.micro_batch, auto=self.auto, context=context))
        self.report(note=f"memory ran out {when}: goes on with micro_batch = {self.runtime.micro_batch}")

    def _update(self, progress: Progress, loss: Tensor) -> None:
        """Clip the gradients and take the step, unless an alert leaves it out; `loss` is this process's share of the mean."""
        norm = full_tensor(nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None]))
        nn.utils.clip_grads_with_norm_(self.weights, self.clip, norm)
        if not self.monitor.each_step:
            self._losses.append(loss)
            self._norms.append(norm)
        elif self._is_left_out(progress, loss, norm):
            self.learner.zero_grad()
            return
        set_learning_rate(self.optimizers, self.schedule.factor(progress.step, steps=progress.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _is_left_out(self, progress: Progress, loss: Tensor, norm: Tensor) -> bool:
        """Judge a step before its update, in every process alike; true if there is to be no update."""
        values = self.group.sum(loss.item(), norm.item() / self.group.size)
        self._judge(progress, progress.step, *values)
        return progress.alerts.skipped[-1:] == [progress.step]

    def _judge(self, progress: Progress, step: int, loss: float, norm: float) -> None:
        rate = self.schedule.learning_rate * self.schedule.factor(step, steps=progress.steps)
        finding = self.monitor.step(progress.alerts, step, loss=loss, norm=norm, rate=rate)
        if finding is not None:
            self._found.append(finding)
        if finding is None or finding.action != "skip":
            progress.recent.append(loss)
            self._norm = norm

    def _accumulate(self, progress: Progress, parts: list[Batch], *, targets: float, rounds: int) -> Tensor | None:
        """Forward and backward passes of a step; returns this process's share of the sum of losses.

        None, in every process, where memory ran out in one while no other waited for it; otherwise that error is raised.
        """
        # Everything else that draws random numbers is seeded by the step, so no state of a generator has to be kept.
        torch.manual_seed((self.seed * 0x9E3779B1 + progress.step) % 2**63)
        loss = torch.zeros((), device=self.group.device)
        # DDP averages gradients over processes, and the loss needs their sum: hence the factor.
        scale = self.group.size / (targets or 1.0)
        late = rounds - len(parts)
        full = False
        for index in range(rounds):
            if index > 0 and self.group.any_full(full, stopping=self.should_stop()):
                return None
            if index < late and not self.together:
                continue
            # A process that has nothing left, but has to compute with the others, computes a row that counts nothing.
            batch = parts[index - late] if index >= late else parts[0].split(1)[0]
            counts = float(index >= late)
            set_counters(self.model, seed=self.seed, step=progress.step, rows=batch.rows)
            # Gradients add up in each process alone until DDP, in the last round, sums them over all. Before that it is not
            # called at all, if possible: it communicates even where it is told not to sum. Under "fsdp" each round sums.
            last = index == rounds - 1
            try:
                with self.group.gradient_sync(self.wrapped, last):
                    total, *_ = (self.wrapped if last or self.together else self.learner)(batch)
                    if not last or self.together:
                        (total * (scale * counts)).backward()
                loss += total.detach() * counts
            except (RuntimeError, MemoryError) as error:
                if self.together or not is_out_of_memory(error):
                    raise
                full, total = True, None
        if not self.together:
            if self.group.any_full(full, stopping=False):  # before the last backward pass, in which DDP waits for all
                self._finish_nothing(parts[0].split(1)[0])
                return None
            (total * scale).backward()
        return loss

    def _finish_nothing(self, batch: Batch) -> None:
        """After a forward pass DDP sums at the next backward pass, whichever it is: one of a row that counts nothing."""
        if self.group.size > 1:
            set_counters(self.model, seed=self.seed, step=0, rows=batch.rows)
            (self.wrapped(batch)[0] * 0.0).backward()

    def collect(self, progress: Progress) -> None:
        """Wait for the steps taken so far, record their losses and judge them; raises what an alert asks for."""
        if self._losses:
            number, size = len(self._losses), self.group.size
            norms = [norm / size for norm in torch.stack(self._norms).tolist()]
            values = self.group.sum(*torch.stack(self._losses).tolist(), *norms)
            self._losses, self._norms = [], []
            for index, (loss, norm) in enumerate(zip(values[:number], values[number:], strict=True)):
                self._judge(progress, progress.step - number + index, loss, norm)
        found, self._found = self._found, []
        self.act(found)

    def act(self, findings: Iterable[Finding]) -> None:
        """Report the findings, and raise what the most severe one asks for: RollBack, InputError or Paused."""
        findings = list(findings)
        decisive = most_severe(findings)
        if decisive is not None and decisive.action in ("rollback", "stop"):  # the rest follows from it
            findings = [one for one in findings if one.steps.stop < decisive.steps.stop] + [decisive]
        for finding in findings:
            advised = f"{finding.text}. {finding.advice}"
            note = {"skip": f"{finding.text}: it is skipped", "warn": f"warning: {advised}"}.get(finding.action)
            message = {"note": note} if note else {"text": finding.text if finding.action == "rollback" else advised}
            self.report(alert=finding.alert, action=finding.action, **message)
        match decisive:
            case Finding(action="rollback"):
                raise RollBack(decisive)
            case Finding(action="stop", alert=alert, text=text, advice=advice):
                raise InputError(f'{text}. {advice}. alerts.{alert}.action is "stop"; checkpoints of earlier steps are kept')
            case Finding(action="pause", alert=alert, text=text, advice=advice):
                raise Paused(f"paused by the alert {alert!r}: {text}. {advice}")

    def forget(self) -> None:
        """Drop what is known of steps that were rolled back."""
        self.learner.zero_grad()
        self._losses, self._norms, self._found = [], [], []
        self._tokens, self._since = 0, time.monotonic()

    def report_steps(self, progress: Progress) -> None:
        """Report the steps since the last report; only at fixed steps, so that a record does not depend on the clock."""
        self.collect(progress)
        now = time.monotonic()
        tokens, seconds = self.group.sum(self._tokens, (now - self._since) / self.group.size)
        loss = sum(progress.recent) / len(progress.recent) if progress.recent else None
        progress.loss = progress.loss if loss is None else loss
        steps = range(progress.reported, progress.step)
        progress.recent, progress.reported = [], progress.step
        speed = tokens / max(seconds, 1e-9)
        self.report(
            step=progress.step,
            steps=progress.steps,
            tokens=progress.tokens,
            loss=progress.loss,
            learning_rate=self.schedule.learning_rate * self.schedule.factor(progress.step - 1, steps=progress.steps),
            gradient_norm=self._norm,
            tokens_per_second=speed,
            **(self._peak or {}),
        )
        self._tokens, self._since = 0, now
        self._peak = {} if self._peak is not None else self._look_up_peak(progress, seconds=seconds / max(1, len(steps)))
        self.act(self.monitor.report(progress.alerts, steps, loss=loss, speed=speed, seconds=seconds))

    def _look_up_peak(self, progress: Progress, *, seconds: float) -> dict[str, float]:
        """The peak of the hardware, for the share of it that is shown; `seconds` is the time of a step."""
        if not self.group.is_main:
            return {}
        began = time.monotonic()
        found = peak_flops(
            self.runtime.precision,
            device=self.group.device,
            threads=self.runtime.threads,
            seconds_left=seconds * (progress.steps - progress.step),
        )
        self._since += time.monotonic() - began  # the speed that is reported is that of training
        return {} if found is None else {"flops_per_token": self.flops_per_token, "peak_flops": found * self.group.size}

    def validate(self, progress: Progress, validation: Validation) -> None:
        """Measure the loss on held-out rows; this does not change what is learned."""
        began = time.monotonic()
        found: dict[str, float] = {"step": progress.step}
        while (losses := self._validation_losses(progress, validation)) is None:
            self._take_less(f"in the validation after step {progress.step}", context=validation.rows.context, alone=False)
        found |= losses
        self.report(**found)
        progress.validation = found
        if not progress.best or found["validation_loss"] < progress.best["validation_loss"]:
            progress.best = found
        self._since += time.monotonic() - began  # the speed that is reported is that of training
        loss = found["validation_loss"]
        self.act(self.monitor.validation(progress.alerts, progress.step, found=loss, loss=progress.loss))

    def _validation_losses(self, progress: Progress, validation: Validation) -> dict[str, float] | None:
        micro_batch, context = self.runtime.micro_batch, validation.rows.context
        try:
            return validation_losses(
                self.learner, validation, group=self.group, micro_batch=micro_batch, should_stop=self.should_stop
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._take_less(f"in the validation after step {progress.step}", context=context, alone=True)
        return None
