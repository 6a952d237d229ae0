"""The training loop, the only one: pretraining, fine-tuning and LoRA differ by objective, rows and which weights learn.

What is learned is a function of the rows, the settings and the seed. Processes, micro-batches, interruptions and everything
that depends on the clock change when and where things are computed, and beyond rounding not what.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm import compilation, training_state
from llm.choices import Choices, choose, is_plain, restored
from llm.dropout import set_counters
from llm.errors import InputError, Interrupted
from llm.feed import batches, feed, most_batches
from llm.group import Group
from llm.memory import is_out_of_memory, peak_memory
from llm.objectives import Learner, Objective
from llm.optim import build_optimizers, set_learning_rate
from llm.parameters import count_parameters
from llm.probe import settle, smaller
from llm.rows import Batch, RowSource
from llm.self_check import self_check
from llm.settings import Budget, Optimizer, Schedule
from llm.validation import Validation, measure

CHECKPOINTS = "checkpoints"  # in scratch
LOG_EVERY = 10  # steps between two reports
LONG = 200  # steps from which on a training is worth a self-check


@dataclass
class Progress:
    """How far a training has come; JSON values only, because it is part of every checkpoint."""

    steps: int
    step: int = 0  # finished
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)  # losses of the steps since the last report
    loss: float | None = None  # mean over the steps of the last report
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    best: dict[str, float] = field(default_factory=dict)  # the one with the lowest loss
    self_check: dict[str, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    objective: Objective,
    *,
    rows: RowSource,
    validation: Validation | None,
    budget: Budget,
    batch_tokens: int,  # per optimizer step, over all processes and accumulation
    schedule: Schedule,
    optimizer: Optimizer,
    seed: int,
    check: bool,  # before a long run, that a fresh model can learn at all
    validate_every: int | None,  # steps; None: only at the end
    checkpoint_every: int | None,  # steps
    checkpoint_minutes: float | None,
    micro_batch: int | Literal["auto"],  # rows per forward pass of a process
    precision: Literal["auto", "fp32", "bf16"],
    compiled: bool | Literal["auto"],  # layers by torch.compile
    cores: int,  # of this machine, shared by its processes
    scratch: Path,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train `model` in place, from the last checkpoint under `scratch` if there is one; returns what a record should tell.

    Raises InputError where the batch cannot be made or the loss is no longer finite, and Interrupted, after a checkpoint,
    once `should_stop` is true in any process.
    """
    group = Group()
    if not rows.rows_per_epoch:
        raise InputError("training wants at least one row to learn from; found none")
    rows_per_step = batch_tokens // rows.context
    if rows_per_step < group.size:
        raise InputError(
            f"batch_tokens wants at least one row of {rows.context} tokens for each of {group.size} processes; "
            f"found {batch_tokens}"
        )
    tokens_per_step = rows_per_step * rows.context
    steps = budget.in_steps(batch_tokens=tokens_per_step, rows_per_step=rows_per_step, rows_per_epoch=rows.rows_per_epoch)
    folder = scratch / CHECKPOINTS
    state = _last_state(folder, group, report)
    shape = f"{model} {rows.context}"
    if state is None:
        choices = choose(
            group,
            micro_batch,
            precision,
            False if compiled == "auto" and not is_plain(model) else compiled,
            cores=cores,
            context=rows.context,
            rows_per_step=rows_per_step,
            flops=steps * tokens_per_step * model.flops_per_token(rows.context),  # type: ignore[operator]  # every one has it
            shape=shape,
        )
        progress = Progress(steps=steps)
        if rows_per_step > rows.rows_per_epoch:
            report(
                note=f"the data has {rows.rows_per_epoch} rows and a step {rows_per_step}, so it sees some twice; "
                f"batch_tokens = {rows.rows_per_epoch * rows.context} would be one pass"
            )
    else:
        choices = restored(state.facts["choices"], group, cores=cores)
        progress = Progress(**state.facts["progress"])
        before = Choices(**state.facts["choices"])
        if (before.processes, before.device) != (choices.processes, choices.device):
            report(
                note=f"began with {before.processes} processes on {before.device}, goes on with {choices.processes} on "
                f"{choices.device}: what is learned stays the same only up to rounding"
            )
    torch.set_num_threads(choices.threads)
    model.to(group.device)
    if state is None and check and steps >= LONG:
        first = next(batches(rows, range(rows_per_step), choices.micro_batch))  # the same in every process
        progress.self_check = self_check(model, objective, first, precision=choices.precision)
        report(note="self-check passed: " + ", ".join(f"{name} {value:.4g}" for name, value in progress.self_check.items()))
    learner = Learner(model, objective, precision=choices.precision)
    choices = settle(learner, rows, choices, auto=micro_batch == "auto", group=group, report=report)
    if choices.compiled:
        compilation.note(shape)
    loop = Loop(
        learner,
        optimizer,
        schedule=schedule,
        seed=seed,
        group=group,
        choices=choices,
        auto=micro_batch == "auto",
        report=report,
        should_stop=should_stop,
    )
    if state is not None:
        training_state.restore(state, model, loop.optimizers)
        report(note=f"continues from step {progress.step} of {steps}")
    state = None  # its copy of all weights is not held any longer
    rounds = most_batches(rows_per_step, group, choices.micro_batch)
    began = time.monotonic() - progress.seconds
    saved = time.monotonic()

    with training_state.Writer(folder) as writer:

        def save() -> None:
            loop.collect(progress)  # raises before anything that is not finite is kept
            if group.is_main:
                progress.seconds = time.monotonic() - began
                facts = {"step": progress.step, "progress": asdict(progress), "choices": asdict(loop.choices)}
                writer.submit(training_state.take(model, loop.optimizers, facts=facts))

        def validate_if_due() -> None:
            due = progress.step == steps or (validate_every is not None and progress.step % validate_every == 0)
            if validation is not None and due and progress.validation.get("step") != progress.step:
                loop.validate(progress, validation)

        try:
            if progress.step:
                validate_if_due()  # the run before this one was stopped in it
            for parts, targets in feed(rows, group, choices.micro_batch, rows_per_step, range(progress.step, steps)):
                due = checkpoint_minutes is not None and time.monotonic() - saved >= 60 * checkpoint_minutes
                total, stopping, overdue = group.sum(targets, should_stop(), due and group.is_main)
                if stopping:
                    raise Interrupted("asked to stop")
                loop.step(progress, parts, targets=total, rounds=rounds)
                progress.step += 1
                progress.tokens += tokens_per_step
                progress.targets += int(total)
                if progress.step == steps or progress.step % LOG_EVERY == 0:
                    loop.report_steps(progress)
                validate_if_due()
                if overdue or (checkpoint_every is not None and progress.step % checkpoint_every == 0):
                    save()
                    saved = time.monotonic()
        except Interrupted:
            # A step or a validation that was not finished left no trace; the next run begins it anew.
            save()
            writer.wait()
            group.sum(0)  # nobody leaves before it is on disk
            raise Interrupted(f"stopped after step {progress.step} of {steps}") from None
    model.eval()
    progress.seconds = time.monotonic() - began
    return _metrics(model, progress, loop.choices, rows=rows, tokens_per_step=tokens_per_step)


class Loop:
    """One training's modules and optimizers, and what its steps have left to report."""

    def __init__(
        self,
        learner: Learner,
        optimizer: Optimizer,
        *,
        schedule: Schedule,
        seed: int,
        group: Group,
        choices: Choices,
        auto: bool,  # whether the micro-batch may shrink
        report: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        model = learner.model
        self.model, self.group, self.choices, self.auto = model, group, choices, auto
        self.report, self.should_stop = report, should_stop
        self.schedule, self.seed = schedule, seed
        self.clip = optimizer.gradient_clip or math.inf
        self.learner = learner
        self.optimizers = build_optimizers(model, optimizer, schedule=schedule)
        self.wrapped = group.wrap(learner)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._losses: list[Tensor] = []  # of steps not yet collected: this process's share
        self._norms: list[Tensor] = []
        self._norm = 0.0  # of the last step collected
        self._since = time.monotonic()
        self._tokens = 0  # of this process, since then

    def step(self, progress: Progress, parts: list[Batch], *, targets: float, rounds: int) -> None:
        """One optimizer step over this process's micro-batches; `targets` is the number over all processes.

        No process has more micro-batches than `rounds`. Who has fewer begins later, so that all do their last one, which
        sums the gradients, together; before each round they may agree to stop.
        """
        self.wrapped.train()
        if self.group.size == 1:
            parts = [piece for part in parts for piece in part.split(self.choices.micro_batch)]
            rounds = len(parts)
        try:
            loss = self._accumulate(progress, parts, targets=targets, rounds=rounds)
        except (RuntimeError, MemoryError) as error:
            if self.group.size > 1 or not is_out_of_memory(error):
                raise
            loss = None
        if loss is None:  # out here nothing holds what the failed attempt had computed
            self.learner.zero_grad()
            micro_batch = smaller(self.choices.micro_batch, auto=self.auto, context=parts[0].tokens.shape[1])
            self.choices = replace(self.choices, micro_batch=micro_batch)
            self.report(note=f"memory ran out at step {progress.step}: goes on with micro_batch = {micro_batch}")
            self.step(progress, parts, targets=targets, rounds=rounds)
            return
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        set_learning_rate(self.optimizers, self.schedule.factor(progress.step, steps=progress.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._losses.append(loss / max(1.0, targets))
        self._norms.append(norm)
        self._tokens += sum(part.tokens.numel() for part in parts)

    def _accumulate(self, progress: Progress, parts: list[Batch], *, targets: float, rounds: int) -> Tensor:
        """Forward and backward passes of a step; returns this process's share of the sum of losses."""
        # Whatever draws numbers besides our own dropout starts afresh, so nothing of a generator has to be kept.
        torch.manual_seed((self.seed * 0x9E3779B1 + progress.step) % 2**63)
        loss = torch.zeros((), device=self.group.device)
        # DDP averages gradients over processes, where the sum is wanted: hence the factor.
        scale = self.group.size / max(1.0, targets)
        late = rounds - len(parts)
        for index in range(rounds):
            if index > 0:
                self.group.stop_if(self.should_stop())
            if index < late:
                continue
            batch = parts[index - late]
            set_counters(self.model, seed=self.seed, step=progress.step, rows=batch.rows)
            # Gradients add up in each process alone until the wrapper, in the last round, sums them over all. Before that it
            # must not be called at all: DDP talks to the other processes even where it is told not to sum.
            total, _ = (self.wrapped if index == rounds - 1 else self.learner)(batch)
            (total * scale).backward()
            loss += total.detach()
        return loss

    def collect(self, progress: Progress) -> None:
        """Wait for the steps taken so far and keep their losses; InputError if one of them was not finite."""
        if not self._losses:
            return
        losses = self.group.sum(*torch.stack(self._losses).tolist())
        norms: list[float] = torch.stack(self._norms).tolist()
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=progress.step - len(losses)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                rate = self.schedule.learning_rate * self.schedule.factor(step, steps=progress.steps)
                raise InputError(
                    f"training wants a finite loss and gradient; found at step {step}: loss {loss:g}, gradient norm {norm:g}, "
                    f"learning rate {rate:g}. A lower schedule.learning_rate or more schedule.warmup_steps usually helps; "
                    "checkpoints of earlier steps are kept"
                )
        progress.recent += losses
        self._norm = norms[-1]
        self._losses, self._norms = [], []

    def report_steps(self, progress: Progress) -> None:
        """Report the steps since the last report; only at fixed steps, so that a record does not depend on the clock."""
        self.collect(progress)
        now = time.monotonic()
        (tokens,) = self.group.sum(self._tokens)
        progress.loss = sum(progress.recent) / len(progress.recent)
        progress.recent = []
        self.report(
            step=progress.step,
            steps=progress.steps,
            tokens=progress.tokens,
            loss=progress.loss,
            learning_rate=self.schedule.learning_rate * self.schedule.factor(progress.step - 1, steps=progress.steps),
            gradient_norm=self._norm,
            tokens_per_second=tokens / max(now - self._since, 1e-9),
        )
        self._tokens, self._since = 0, now

    def validate(self, progress: Progress, validation: Validation) -> None:
        """Measure the loss on held-out text; training goes on as if it had not happened."""
        began = time.monotonic()
        found: dict[str, float] = {"step": progress.step}
        found |= measure(
            self.learner, validation, group=self.group, micro_batch=self.choices.micro_batch, should_stop=self.should_stop
        )
        self.report(**found)
        progress.validation = found
        if not progress.best or found["validation_loss"] < progress.best["validation_loss"]:
            progress.best = found
        self._since += time.monotonic() - began  # the speed that is reported is of training


def _last_state(folder: Path, group: Group, report: Callable[..., None]) -> training_state.TrainingState | None:
    """The last sound checkpoint, the same one in every process."""
    path, damaged = training_state.newest(folder) if group.is_main else (None, [])
    path = group.from_main(path)
    for broken in damaged:
        instead = f"goes on from {path.name}" if path is not None else "starts from the beginning"
        report(note=f"checkpoint {broken.name} is damaged and removed: {instead}")
        shutil.rmtree(broken)
    return None if path is None else training_state.read(path)


def _metrics(
    model: nn.Module, progress: Progress, choices: Choices, *, rows: RowSource, tokens_per_step: int
) -> dict[str, Any]:
    learned, parameters = count_parameters(model)
    flops = progress.tokens * model.flops_per_token(rows.context)  # type: ignore[operator]  # every registered model has it
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "trained_parameters": learned,
        "steps": progress.steps,
        "epochs": round(progress.tokens / (rows.rows_per_epoch * rows.context), 4),  # passes made over the data
        "tokens": progress.tokens,
        "targets": progress.targets,
        "tokens_per_step": tokens_per_step,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "loss": progress.loss,
        "flops": flops,  # an estimate: matrix products of one forward and backward pass, attention included
        "peak_memory_bytes": peak_memory(choices.device),
        "choices": asdict(choices),
    }
    metrics |= {name: value for name, value in progress.validation.items() if name != "step"}
    if progress.best:
        metrics |= {"best_validation_loss": progress.best["validation_loss"], "best_validation_step": progress.best["step"]}
    if progress.self_check:
        metrics["self_check"] = progress.self_check
    return metrics
