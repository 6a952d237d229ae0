"""What a training consists of, put together: the learner where it trains, with what fits and works there, and its loop."""

from collections.abc import Callable
from functools import partial

from llm.adapters.frozen import hold_once
from llm.models.interface import LanguageModel
from llm.training.distributed.fsdp import shard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches
from llm.training.loss import Learner
from llm.training.preflight.dry_run import settle
from llm.training.preflight.sanity_check import sanity_check
from llm.training.runtime import Runtime, compiled_shape, note_compiled
from llm.training.step import Loop
from llm.training.task import TrainingTask

LONG = 200  # steps from which on a training is worth a sanity check


def build(
    model: LanguageModel,
    task: TrainingTask,
    runtime: Runtime,
    *,
    auto: bool,  # whether the micro-batch may be made smaller
    group: ProcessGroup,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> Loop:
    """The loop that trains `model`, in which the runtime is settled: what was tried here and did not work is not in it.

    Under "fsdp" `model` is emptied; `llm.training.distributed.fsdp.gather` fills it again.
    """
    context = task.rows.context
    flops, shape = model.flops_per_token(context), compiled_shape(model, context, runtime)
    # Processes that have a base on CPU each share the pages of its file, as long as none of them casts its own.
    if runtime.strategy != "ddp" or group.device.type != "cpu":
        hold_once(model, runtime.precision)
    learner = Learner(model, task.objective, precision=runtime.precision)
    learner = shard(learner, runtime.strategy, device=group.device, processes=group.size)
    runtime = settle(learner, task.rows, runtime, auto=auto, group=group, report=report)
    if runtime.compiled:
        note_compiled(shape)
    return Loop(learner, task, runtime, auto=auto, group=group, flops_per_token=flops, report=report, should_stop=should_stop)


def check_if_long(
    model: LanguageModel, task: TrainingTask, runtime: Runtime, *, group: ProcessGroup, report: Callable[..., None]
) -> dict[str, float]:
    """What the sanity check of a fresh `model` found; nothing where the training is too short for one."""
    if task.steps < LONG:
        return {}
    batch = next(batches(task.rows, range(task.rows_per_step), runtime.micro_batch))  # the same in every process
    placed = partial(shard, strategy=runtime.strategy, device=group.device, processes=group.size)
    found = sanity_check(
        model,
        task.objective,
        batch,
        precision=runtime.precision,
        placed=placed,
        agreed=lambda loss: group.max(loss)[0],  # sums of another order, or on another device, differ in the last bits
    )
    report(note="self-check passed: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found
