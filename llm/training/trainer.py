"""The training loop, the only one: pretraining, fine-tuning and LoRA differ by objective, rows and which weights learn.

What is learned is a function of the rows, the settings and the seed. Processes, micro-batches, interruptions and everything
that depends on the clock change when and where things are computed, and beyond rounding not what.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from llm.data.batch import RowSource
from llm.device import peak_memory
from llm.errors import InputError, Interrupted, MemoryShortageError, Paused
from llm.models.interface import LanguageModel, count_parameters
from llm.training import checkpoint
from llm.training.alerts.config import Alerts
from llm.training.alerts.monitor import MOST_ROLLBACKS, AlertMonitor, RollBack
from llm.training.checkpoint import carry
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.distributed.fsdp import gather, is_sharded, reshard, shard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.dry_run import settle
from llm.training.loader import batches, feed, most_batches
from llm.training.loss import Learner, Objective
from llm.training.row_log import RowLog
from llm.training.runtime import (
    Runtime,
    is_plain,
    layout,
    limit_memory,
    note_compiled,
    resolve_runtime,
    restore_runtime,
    with_memory_limit,
)
from llm.training.sanity_check import self_check
from llm.training.step import LOG_EVERY, Loop, Progress
from llm.training.validation import Validation

CHECKPOINTS = "checkpoints"  # in scratch
LONG = 200  # steps from which on a training is worth a self-check


def train(
    model: LanguageModel,
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
    keep_checkpoints: int,  # the last ones
    alerts: Alerts,
    micro_batch: int | Literal["auto"],  # rows per forward pass of a process
    precision: Literal["auto", "fp32", "bf16"],
    compiled: bool | Literal["auto"],  # layers by torch.compile
    fused_attention: bool | Literal["auto"],  # by a kernel of its own
    strategy: Literal["ddp", "fsdp"],  # of several processes
    find_unused_parameters: bool,  # under "ddp"
    cores: int,  # of this machine, shared by its processes
    timeout_minutes: float,  # for which processes wait for each other
    scratch: Path,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
    row_log: RowLog | None = None,
    beginning: Path | None = None,  # the folder in which a shorter training was left, of which this is the rest
    left_in: Path | None = None,  # a folder for what another training needs to go on where this one ends
) -> dict[str, Any]:
    """Train `model` in place, from the last checkpoint under `scratch` if there is one; returns what a record should tell.

    A training that is `left_in` a folder ends as if it were interrupted there: what only an end asks for, a report between
    the regular ones and a look at held-out text, is left to the one that goes on.

    Raises InputError where the batch cannot be made, the training does not fit its `beginning`, or an alert says stop, as it
    does by default where the loss is no longer finite; Paused, after a checkpoint, where one says pause; and Interrupted,
    after a checkpoint, once `should_stop` is true in any process.
    """
    group = ProcessGroup(find_unused_parameters=find_unused_parameters, timeout_minutes=timeout_minutes)
    if not rows.rows_per_epoch:
        raise InputError("training: expected at least one row to learn from, got none")
    rows_per_step = batch_tokens // rows.context
    if rows_per_step < group.size:
        raise InputError(
            f"batch_tokens: expected at least one row of {rows.context} tokens for each of {group.size} processes, "
            f"got {batch_tokens}"
        )
    tokens_per_step = rows_per_step * rows.context
    steps = budget.in_steps(batch_tokens=tokens_per_step, rows_per_step=rows_per_step, rows_per_epoch=rows.rows_per_epoch)
    folder = scratch / CHECKPOINTS
    state = _last_state(folder, group, report, beginning=beginning)
    shape = f"{model} {rows.context}"
    if state is None:
        runtime = resolve_runtime(
            group,
            micro_batch,
            precision,
            False if compiled == "auto" and not is_plain(model) else compiled,
            fused_attention,
            strategy,
            cores=cores,
            context=rows.context,
            rows_per_step=rows_per_step,
            flops=steps * tokens_per_step * model.flops_per_token(rows.context),
            shape=shape,
        )
        progress = Progress(steps=steps)
        if rows_per_step > rows.rows_per_epoch:
            report(
                note=f"the data has {rows.rows_per_epoch} rows and a step {rows_per_step}, so it sees some twice; "
                f"batch_tokens = {rows.rows_per_epoch * rows.context} would be one pass"
            )
    else:
        runtime = restore_runtime(state.facts["choices"], group, strategy, cores=cores)
        progress = Progress.of(state.facts["progress"])
        progress.steps = steps
        if progress.step == progress.first_step:
            _check_fit(progress, optimizer, state.facts["optimizer"])
        before, now = layout(Runtime(**state.facts["choices"])), layout(runtime)
        if before != now:
            report(note=f"began with {before}, goes on with {now}: what is learned stays the same only up to rounding")
    if micro_batch == "auto":
        runtime = with_memory_limit(runtime, scratch)
    torch.set_num_threads(runtime.threads)
    placed = partial(shard, strategy=runtime.strategy, device=group.device, processes=group.size)
    if state is None and check and steps >= LONG:
        first = next(batches(rows, range(rows_per_step), runtime.micro_batch))  # the same in every process
        progress.self_check = self_check(model, objective, first, precision=runtime.precision, placed=placed)
        report(note="self-check passed: " + ", ".join(f"{name} {value:.4g}" for name, value in progress.self_check.items()))
    learner = placed(Learner(model, objective, precision=runtime.precision))
    runtime = settle(learner, rows, runtime, auto=micro_batch == "auto", group=group, report=report)
    if runtime.compiled:
        note_compiled(shape)
    loop = Loop(
        learner,
        optimizer,
        schedule=schedule,
        seed=seed,
        group=group,
        runtime=runtime,
        auto=micro_batch == "auto",
        monitor=AlertMonitor(alerts, warmup_steps=schedule.warmup_steps),
        flops_per_token=model.flops_per_token(rows.context),
        report=report,
        should_stop=should_stop,
    )
    if state is not None:
        checkpoint.restore(state, learner.model, loop.optimizers)
        report(note=f"continues from step {progress.step} of {steps}")
    state = None  # its copy of all weights is not held any longer
    rounds = most_batches(rows_per_step, group, runtime.micro_batch)
    began = time.monotonic() - progress.seconds
    saved = time.monotonic()

    # An alert rolls back to a checkpoint from before its steps; these are known at the report after them at the latest.
    reach = alerts.reach + LOG_EVERY if alerts.does("rollback") else None
    with checkpoint.Writer(folder, kept=keep_checkpoints, reach=reach) as writer:

        def save() -> None:
            loop.collect(progress)  # raises before anything that is not finite is kept
            progress.seconds = time.monotonic() - began
            put(writer.submit)

        def put(write: Callable[[checkpoint.TrainingState], None]) -> None:
            facts = {
                "step": progress.step,
                "progress": asdict(progress),
                "choices": asdict(loop.runtime),
                "optimizer": optimizer.kind,
            }
            if group.is_main or is_sharded(learner):
                reshard(learner)  # a validation that was stopped has gathered weights
                taken = checkpoint.take(learner.model, loop.optimizers, facts=facts, keep=group.is_main)
                if group.is_main:
                    write(taken)

        def is_over() -> bool:
            return progress.step == steps and left_in is None

        def validate_if_due() -> None:
            due = is_over() or (validate_every is not None and progress.step % validate_every == 0)
            if validation is not None and due and progress.validation.get("step") != progress.step:
                loop.validate(progress, validation)

        def go_on() -> None:
            nonlocal saved
            if progress.step:
                validate_if_due()  # the run before this one was stopped in it
            elif reach is not None:
                save()  # the beginning, to roll back to
            ahead = range(progress.step, steps)
            with closing(feed(rows, group, runtime.micro_batch, rows_per_step, ahead, progress.alerts.place)) as fed:
                for parts, targets in fed:
                    due = checkpoint_minutes is not None and time.monotonic() - saved >= 60 * checkpoint_minutes
                    total, stopping, overdue = group.sum(targets, should_stop(), due and group.is_main)
                    if stopping:
                        raise Interrupted("asked to stop")
                    loop.step(progress, parts, targets=total, rounds=rounds)
                    if row_log is not None:
                        row_log(progress.step, parts)
                    progress.step += 1
                    progress.tokens += tokens_per_step
                    progress.targets += int(total)
                    if is_over() or progress.step % LOG_EVERY == 0:
                        loop.report_steps(progress)
                    validate_if_due()
                    if overdue or (checkpoint_every is not None and progress.step % checkpoint_every == 0):
                        save()
                        saved = time.monotonic()
            loop.collect(progress)

        def roll_back(offence: RollBack) -> Progress:
            writer.wait()
            steps_undone = range(max(offence.steps.start, progress.first_step), offence.steps.stop)
            before = _last_state(folder, group, report, until=steps_undone.start)
            if before is None:
                raise InputError(f"{offence}; there is no checkpoint to roll back to")
            reshard(learner)  # a validation that was stopped has gathered weights
            checkpoint.restore(before, learner.model, loop.optimizers)
            loop.forget()
            memory = progress.alerts
            memory.pass_over(steps_undone)
            restored = Progress.of(before.facts["progress"])
            restored.steps = steps
            restored.alerts.passed, restored.alerts.rollbacks = memory.passed, [*memory.rollbacks, offence.finding.steps.start]
            if len(restored.alerts.rollbacks) > MOST_ROLLBACKS:
                raise InputError(f"{offence}; {MOST_ROLLBACKS} rollbacks before it were of no use")
            if group.is_main:
                checkpoint.forget_after(folder, restored.step)
            first, last = steps_undone.start, steps_undone.stop - 1
            rows_of = f"step {first}" if first == last else f"steps {first} to {last}"
            report(note=f"{offence}: goes back to step {restored.step}, and past the rows of {rows_of}")
            return restored

        while True:
            try:
                go_on()
                break
            except MemoryShortageError as shortage:
                limit_memory(scratch, shortage.micro_batch)
                raise
            except RollBack as offence:
                progress = roll_back(offence)
            except (Interrupted, Paused) as end:
                # A step or a validation that was not finished left no trace; the next run begins it anew.
                reason = end
                try:
                    save()
                except Paused as found:  # by a step that was not judged before
                    reason = found
                    save()
                except RollBack:
                    pass  # what would be saved is to be undone; the next run finds so too
                writer.wait()
                group.sum(0)  # nobody leaves before it is on disk
                if isinstance(reason, Paused):
                    raise Paused(f"{reason}. Checkpointed after step {progress.step} of {steps}") from None
                raise Interrupted(f"stopped after step {progress.step} of {steps}") from None
        if left_in is not None:
            put(partial(checkpoint.leave, left_in))
    gather(learner, model)
    model.eval()
    progress.seconds = time.monotonic() - began
    return _metrics(model, progress, loop.runtime, rows=rows, tokens_per_step=tokens_per_step)


def _last_state(
    folder: Path,
    group: ProcessGroup,
    report: Callable[..., None],
    *,
    until: int | None = None,
    beginning: Path | None = None,
) -> checkpoint.TrainingState | None:
    """The last sound checkpoint, after the step `until` none, the same one in every process; where there is none, what a
    training before was left with in the folder `beginning`.
    """
    if group.is_main:
        checkpoint.remove_partial(folder)
    path, damaged = checkpoint.newest(folder, until=until) if group.is_main else (None, [])
    for broken in damaged:
        instead = f"goes on from {path.name}" if path is not None else "starts from the beginning"
        report(note=f"checkpoint {broken.name} is damaged and removed: {instead}")
        shutil.rmtree(broken)
    if group.is_main and path is None and beginning is not None:
        path = checkpoint.begin(folder, beginning)
    path = group.from_main(path)
    state = None if path is None else checkpoint.read(carry(path, folder, group))
    group.sum(0)  # nobody writes that checkpoint anew before all have read it
    return state


def _check_fit(progress: Progress, optimizer: Optimizer, kind: str) -> None:
    """That a training can go on from where another ended."""
    if progress.steps <= progress.step:
        raise InputError(
            f"budget: expected more than the {progress.step} steps that it goes on from, which are part of it, "
            f"got {progress.steps}"
        )
    if kind != optimizer.kind:
        raise InputError(f"optimizer.kind: expected {kind!r}, as in the training that it goes on from, got {optimizer.kind!r}")


def _metrics(
    model: LanguageModel, progress: Progress, runtime: Runtime, *, rows: RowSource, tokens_per_step: int
) -> dict[str, Any]:
    learned, parameters = count_parameters(model)
    computed = progress.tokens - progress.first_tokens
    flops = computed * model.flops_per_token(rows.context)
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "trained_parameters": learned,
        "steps": progress.steps,
        "epochs": round(progress.tokens / (rows.rows_per_epoch * rows.context), 4),  # passes made over the data
        "tokens": progress.tokens,
        "targets": progress.targets,
        "tokens_per_step": tokens_per_step,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(computed / max(progress.seconds, 1e-9), 1),
        "loss": progress.loss,
        "flops": flops,  # an estimate: matrix products of one forward and backward pass, attention included
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
