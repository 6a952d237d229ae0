"""The training loop, the only one: pretraining, fine-tuning and LoRA differ by objective, rows and which weights learn.

What is learned is a function of the rows, the settings and the seed. Processes, micro-batches, interruptions and everything
that depends on the clock change when and where things are computed, and beyond rounding not what.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm import training_state
from llm.choices import Choices, choose, restored
from llm.dropout import set_counters
from llm.errors import InputError, Interrupted
from llm.feed import batches, feed
from llm.group import Group
from llm.memory import peak_memory
from llm.objectives import Objective
from llm.optim import build_optimizers, set_learning_rate
from llm.precision import Precision, autocast
from llm.rows import Batch, RowSource
from llm.self_check import self_check
from llm.settings import Budget, Optimizer, Schedule

CHECKPOINTS = "checkpoints"  # in scratch
LOG_EVERY = 10  # steps between two reports
LONG = 200  # steps from which on a training is worth a self-check


@dataclass(frozen=True)
class Validation:
    """Text held out, in a fixed order."""

    rows: RowSource
    bytes_per_token: float | None = None  # of the whole text; None where bits per byte mean nothing
    tokens: int = 262_144  # positions to compute at most


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


class Learner(nn.Module):
    """Model and objective as one module, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module, objective: Objective, *, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the batch's targets, and their number."""
        with autocast(self.precision, device=batch.tokens.device):
            return self.objective(self.model, batch)


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
    if state is None:
        choices = choose(group, micro_batch, precision, cores=cores, context=rows.context, rows_per_step=rows_per_step)
        progress = Progress(steps=steps)
    else:
        choices = restored(state.facts["choices"], group, cores=cores)
        progress = Progress(**state.facts["progress"])
    torch.set_num_threads(choices.threads)
    model.to(group.device)
    if state is None and check and steps >= LONG:
        with autocast(choices.precision, device=group.device):
            progress.self_check = self_check(model, objective, rows.row(0))
        report(note="self-check passed: " + ", ".join(f"{name} {value:.4g}" for name, value in progress.self_check.items()))
    loop = Loop(model, objective, optimizer, schedule=schedule, seed=seed, group=group, choices=choices, report=report)
    if state is not None:
        training_state.restore(state, model, loop.optimizers)
        report(note=f"continues from step {progress.step} of {steps}")
    state = None  # its copy of all weights is not held any longer
    began = time.monotonic() - progress.seconds
    saved = time.monotonic()

    with training_state.Writer(folder) as writer:

        def save() -> None:
            loop.collect(progress)  # raises before anything that is not finite is kept
            if group.is_main:
                progress.seconds = time.monotonic() - began
                facts = {"step": progress.step, "progress": asdict(progress), "choices": asdict(choices)}
                writer.submit(training_state.take(model, loop.optimizers, facts=facts))

        for parts, targets in feed(rows, group, choices.micro_batch, rows_per_step, range(progress.step, steps)):
            due = checkpoint_minutes is not None and time.monotonic() - saved >= 60 * checkpoint_minutes
            total, stopping, overdue = group.sum(targets, should_stop(), due and group.is_main)
            if stopping:
                save()
                writer.wait()
                group.sum(0)  # nobody leaves before it is on disk
                raise Interrupted(f"stopped after step {progress.step} of {steps}")
            loop.step(progress, parts, targets=total)
            progress.step += 1
            progress.tokens += tokens_per_step
            progress.targets += int(total)
            last = progress.step == steps
            if last or progress.step % LOG_EVERY == 0:
                loop.report_steps(progress)
            if validation is not None and (last or (validate_every is not None and progress.step % validate_every == 0)):
                loop.validate(progress, validation)
            if overdue or (checkpoint_every is not None and progress.step % checkpoint_every == 0):
                save()
                saved = time.monotonic()
    model.eval()
    progress.seconds = time.monotonic() - began
    return _metrics(model, progress, choices, context=rows.context, tokens_per_step=tokens_per_step)


class Loop:
    """One training's modules and optimizers, and what its steps have left to report."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        *,
        schedule: Schedule,
        seed: int,
        group: Group,
        choices: Choices,
        report: Callable[..., None],
    ) -> None:
        self.model, self.group, self.choices, self.report = model, group, choices, report
        self.schedule, self.seed = schedule, seed
        self.clip = optimizer.gradient_clip or math.inf
        self.learner = Learner(model, objective, precision=choices.precision)
        self.optimizers = build_optimizers(model, optimizer, schedule=schedule)
        self.wrapped = group.wrap(self.learner)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._losses: list[Tensor] = []  # of steps not yet collected: this process's share
        self._norms: list[Tensor] = []
        self._norm = 0.0  # of the last step collected
        self._since = time.monotonic()
        self._tokens = 0  # of this process, since then

    def step(self, progress: Progress, parts: list[Batch], *, targets: float) -> None:
        """One optimizer step over this process's micro-batches; `targets` is the number over all processes."""
        self.wrapped.train()
        # Whatever draws numbers besides our own dropout starts afresh, so nothing of a generator has to be kept.
        torch.manual_seed((self.seed * 0x9E3779B1 + progress.step) % 2**63)
        loss = torch.zeros((), device=self.group.device)
        # DDP averages gradients over processes, where the sum is wanted: hence the factor.
        scale = self.group.size / max(1.0, targets)
        for index, batch in enumerate(parts):
            set_counters(self.model, seed=self.seed, step=progress.step, rows=batch.rows)
            if index < len(parts) - 1:
                with self.group.without_sync(self.wrapped):
                    loss += self._backward(batch, scale)
            else:
                loss += self._backward(batch, scale)
            self._tokens += batch.tokens.numel()
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        set_learning_rate(self.optimizers, self.schedule.factor(progress.step, steps=progress.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._losses.append(loss / max(1.0, targets))
        self._norms.append(norm)

    def _backward(self, batch: Batch, scale: float) -> Tensor:
        total, _ = self.wrapped(batch)
        (total * scale).backward()
        detached: Tensor = total.detach()
        return detached

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

    @torch.no_grad()
    def validate(self, progress: Progress, validation: Validation) -> None:
        """Mean loss per target on held-out text, shared by the processes; training goes on as if it had not happened."""
        began = time.monotonic()
        source = validation.rows
        count = max(1, min(source.rows_per_epoch, validation.tokens // source.context))
        mine = range(self.group.rank, count, self.group.size)
        self.learner.eval()
        total = targets = positions = torch.zeros((), dtype=torch.float64, device=self.group.device)
        for batch in batches(source, mine, self.choices.micro_batch):
            batch = batch.to(self.group.device)
            loss, number = self.learner(batch)
            total, targets, positions = total + loss, targets + number, positions + (batch.documents >= 0).sum()
        nats, number, tokens = self.group.sum(total.item(), targets.item(), positions.item())
        loss_per_target = nats / max(1.0, number)
        found = {
            "step": progress.step,
            "validation_loss": loss_per_target,
            "validation_perplexity": math.exp(min(loss_per_target, 700.0)),  # beyond lies infinity, which JSON cannot say
        }
        if validation.bytes_per_token is not None:
            found["validation_bits_per_byte"] = nats / math.log(2) / max(1.0, tokens * validation.bytes_per_token)
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
        report(note=f"checkpoint {broken.name} is damaged: {instead}")
    return None if path is None else training_state.read(path)


def _metrics(model: nn.Module, progress: Progress, choices: Choices, *, context: int, tokens_per_step: int) -> dict[str, Any]:
    flops = progress.tokens * model.flops_per_token(context)  # type: ignore[operator]  # every registered model has it
    metrics: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trained_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "steps": progress.steps,
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
