"""The training loop, the only one: pretraining, fine-tuning, LoRA and DPO differ by objective, rows and which weights learn.

What is learned depends on the rows, the settings and the seed. Processes, micro-batches, interruptions and everything that
depends on the clock change when and where it is computed, and beyond rounding not the result.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from llm.device import ask_for_determinism, peak_memory
from llm.errors import Interrupted, Paused
from llm.models.interface import LanguageModel, count_parameters
from llm.training import checkpoint
from llm.training.alerts.config import Alerts
from llm.training.alerts.monitor import RollBack
from llm.training.build import build, check_if_long
from llm.training.distributed.failure import failing_together
from llm.training.distributed.fsdp import gather, is_sharded, reshard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import feed, most_batches
from llm.training.resume import last_state, resume, roll_back
from llm.training.row_log import RowLog
from llm.training.runtime import Runtime, limit_memory, resolve_runtime, with_memory_limit
from llm.training.step import LOG_EVERY, Loop, Progress
from llm.training.task import CheckpointConfig, ComputeConfig, TrainingTask
from llm.training.validation import Validation

SHOW_SECONDS = 15.0  # between two reports, where steps take long


def train(
    model: LanguageModel,
    task: TrainingTask,
    *,
    compute: ComputeConfig,
    checkpoints: CheckpointConfig,
    validation: Validation | None,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
    row_log: RowLog | None = None,
    check: bool = False,  # before a long training, that a fresh model can learn at all
) -> dict[str, Any]:
    """Train `model` in place, from the last checkpoint under `checkpoints.scratch` if there is one; returns the metrics.

    With `checkpoints.leave_in`, a training ends as if it were interrupted there: the last report and the last validation are
    left to the training that continues it.

    Raises InputError where the batch cannot be made, the training does not fit the one that it continues, or an alert's action
    is "stop" (as for a loss that is not finite, by default); Paused, after a checkpoint, where an alert's action is "pause";
    and Interrupted, after a checkpoint, once `should_stop` is true in any process.
    """
    group = ProcessGroup(find_unused_parameters=compute.find_unused_parameters, timeout_minutes=compute.timeout_minutes)
    ask_for_determinism(group.device)
    task, compute, checkpoints, validation = _as_main(model, task, compute, checkpoints, validation, group=group)
    # A rollback takes a checkpoint from before the steps that were bad, which may be noticed at the next report only.
    reach = task.alerts.reach + LOG_EVERY if task.alerts.does("rollback") else None
    with (
        checkpoint.Writer(checkpoints.folder, kept=checkpoints.keep, reach=reach) as writer,
        failing_together(group, limit_memory=partial(limit_memory, checkpoints.scratch), before_end=writer.wait),
    ):
        loop, progress = _begin(
            model, task, compute, checkpoints, group=group, report=report, should_stop=should_stop, check=check
        )
        run = _Run(loop, progress, task, checkpoints, writer, validation, row_log)
        run.finish()
        gather(loop.learner, model)
    model.eval()
    run.progress.seconds = time.monotonic() - run.began
    return _metrics(model, task, run.progress, loop.runtime)


def _as_main(
    model: LanguageModel,
    task: TrainingTask,
    compute: ComputeConfig,
    checkpoints: CheckpointConfig,
    validation: Validation | None,
    *,
    group: ProcessGroup,
) -> tuple[TrainingTask, ComputeConfig, CheckpointConfig, Validation | None]:
    """What the main process was told of when to do what and how to compute: machines may be started with other recipes.

    Each process keeps its own data, folders and cores. The same data and the same result are for the caller to see to.
    """
    when = (checkpoints.every, checkpoints.minutes, checkpoints.keep)
    looks = None if validation is None else (validation.tokens, validation.every)
    alerts, main, (every, minutes, keep), looks, model.recompute = group.from_main(
        (task.alerts.model_dump_json(), asdict(compute), when, looks, model.recompute)
    )
    if validation is not None:
        validation = None if looks is None else replace(validation, tokens=looks[0], every=looks[1])
    checkpoints = replace(checkpoints, every=every, minutes=minutes, keep=keep)
    task = replace(task, alerts=Alerts.model_validate_json(alerts))
    return task, replace(compute, **main | {"cores": compute.cores}), checkpoints, validation


def _begin(
    model: LanguageModel,
    task: TrainingTask,
    compute: ComputeConfig,
    checkpoints: CheckpointConfig,
    *,
    group: ProcessGroup,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
    check: bool,
) -> tuple[Loop, Progress]:
    """The loop and where it begins: at the last checkpoint, if there is one."""
    task.check(processes=group.size)
    state = last_state(checkpoints.folder, group=group, report=report, start_from=checkpoints.start_from)
    if state is None:
        runtime, progress = resolve_runtime(model, task, compute, group=group), Progress(steps=task.steps)
        _note_repeated_rows(task, report)
    else:
        runtime, progress = resume(state.facts, task, compute, group=group, report=report)
    auto = compute.micro_batch == "auto"
    if auto:
        runtime = with_memory_limit(runtime, checkpoints.scratch, group=group)
    torch.set_num_threads(runtime.threads)
    if state is None and check:
        progress.self_check = check_if_long(model, task, runtime, group=group, report=report)
    loop = build(model, task, runtime, auto=auto, group=group, report=report, should_stop=should_stop)
    if state is not None:
        checkpoint.restore(state, loop.model, loop.optimizers)
        report(note=f"continues from step {progress.step} of {task.steps}")
    return loop, progress


def _note_repeated_rows(task: TrainingTask, report: Callable[..., None]) -> None:
    rows = task.rows.rows_per_epoch
    if task.rows_per_step > rows:
        report(
            note=f"the data has {rows} rows and a step {task.rows_per_step}, so it sees some twice; "
            f"batch_tokens = {rows * task.rows.context} would be one pass"
        )


@dataclass
class _Run:
    """A training from where it is to its end: steps, and validations and checkpoints when they are due."""

    loop: Loop
    progress: Progress
    task: TrainingTask
    checkpoints: CheckpointConfig
    writer: checkpoint.Writer
    validation: Validation | None
    row_log: RowLog | None

    def __post_init__(self) -> None:
        now = time.monotonic()
        self.began = now - self.progress.seconds  # as if the runs before it had been part of this one
        self.saved = self.shown = now

    def finish(self) -> None:
        """Take all steps that are left; Interrupted or Paused after a checkpoint."""
        while True:
            try:
                self._take_steps()
                break
            except RollBack as cause:
                self.progress = roll_back(cause, self.loop, self.progress, writer=self.writer)
            except (Interrupted, Paused) as reason:
                raise self._stopped(reason) from None
        if self.checkpoints.leave_in is not None:
            self._write(partial(checkpoint.export_state, self.checkpoints.leave_in))

    def _take_steps(self) -> None:
        loop, group, task, progress = self.loop, self.loop.group, self.task, self.progress
        rounds = most_batches(task.rows_per_step, group, loop.loaded)
        if progress.step:
            self._validate_if_due()  # the run before this one was stopped in it
        elif self.writer.reach is not None:
            self._save()  # the beginning, to roll back to
        ahead = range(progress.step, task.steps)
        with closing(feed(task.rows, group, loop.loaded, task.rows_per_step, ahead, progress.alerts.place)) as fed:
            for parts, targets in fed:
                overdue = self._minutes_are_over() and group.is_main
                total, stopping, saving = group.sum(targets, loop.should_stop(), overdue)
                if stopping:
                    raise Interrupted("asked to stop")
                loop.step(progress, parts, targets=total, rounds=rounds)
                if self.row_log is not None:
                    self.row_log(progress.step, parts)
                progress.step += 1
                progress.tokens += task.tokens_per_step
                progress.targets += round(total)
                if self._is_over() or progress.step % LOG_EVERY == 0:
                    loop.report_steps(progress)
                    self.shown = time.monotonic()
                elif time.monotonic() - self.shown > SHOW_SECONDS:  # only how far it is, since the clock decides when
                    loop.report(step=progress.step, steps=progress.steps)
                    self.shown = time.monotonic()
                self._validate_if_due()
                every = self.checkpoints.every
                if saving or (every is not None and progress.step % every == 0):
                    self._save()
                    self.saved = time.monotonic()
        loop.collect(progress)

    def _is_over(self) -> bool:
        return self.progress.step == self.task.steps and self.checkpoints.leave_in is None

    def _minutes_are_over(self) -> bool:
        minutes = self.checkpoints.minutes
        return minutes is not None and time.monotonic() - self.saved >= 60 * minutes

    def _validate_if_due(self) -> None:
        if self.validation is None:
            return
        every, step = self.validation.every, self.progress.step
        due = self._is_over() or (every is not None and step % every == 0)
        if due and self.progress.validation.get("step") != step:
            self.loop.validate(self.progress, self.validation)

    def _save(self) -> None:
        """Start writing a checkpoint; raises what an alert says of a step that was not judged before."""
        self.loop.collect(self.progress)  # so nothing that is not finite is kept
        self.progress.seconds = time.monotonic() - self.began
        self._write(self.writer.submit)

    def _write(self, write: Callable[[checkpoint.TrainingState], None]) -> None:
        loop = self.loop
        facts = {
            "step": self.progress.step,
            "progress": asdict(self.progress),
            "choices": asdict(loop.runtime),
            "optimizer": self.task.optimizer.kind,
        }
        if loop.group.is_main or is_sharded(loop.learner):
            reshard(loop.learner)  # a validation that was stopped has gathered weights
            state = checkpoint.take(loop.model, loop.optimizers, facts=facts, keep=loop.group.is_main)
            if loop.group.is_main:
                write(state)

    def _stopped(self, reason: Interrupted | Paused) -> Interrupted | Paused:
        """How the run ends, once a checkpoint is on disk.

        A step or a validation that was not finished left no trace; the next run does it from its start.
        """
        try:
            self._save()
        except Paused as found:
            reason = found
            self._save()
        except RollBack:
            pass  # what would be saved is to be undone, as the next run finds too
        self.writer.wait()
        self.loop.group.wait()  # no process leaves before it is on disk
        where = f"after step {self.progress.step} of {self.task.steps}"
        return Paused(f"{reason}. Checkpointed {where}") if isinstance(reason, Paused) else Interrupted(f"stopped {where}")


def _metrics(model: LanguageModel, task: TrainingTask, progress: Progress, runtime: Runtime) -> dict[str, Any]:
    """What the record of a finished training says."""
    learned, parameters = count_parameters(model)
    rows, computed = task.rows, progress.tokens - progress.first_tokens
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "trained_parameters": learned,
        "steps": progress.steps,
        "epochs": round(progress.tokens / (rows.rows_per_epoch * rows.context), 4),  # passes made over the data
        "tokens": progress.tokens,
        "targets": progress.targets,
        "tokens_per_step": task.tokens_per_step,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(computed / max(progress.seconds, 1e-9), 1),
        "loss": progress.loss,
        "flops": computed * model.flops_per_token(rows.context),  # an estimate: matrix products, attention included
        "peak_memory_bytes": peak_memory(runtime.device),
        "choices": asdict(runtime),
    }
    if progress.first_step:  # steps, epochs, tokens and targets count those before it, too
        metrics["first_step"] = progress.first_step
    metrics |= {name: value for name, value in progress.validation.items() if name != "step"}
    if progress.best:
        metrics |= {"best_validation_loss": progress.best["validation_loss"], "best_validation_step": progress.best["step"]}
    if progress.self_check:
        metrics["self_check"] = progress.self_check
    if alerts := progress.alerts.facts():
        metrics["alerts"] = alerts
    return metrics
