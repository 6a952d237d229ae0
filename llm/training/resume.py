"""Going on from a checkpoint: the last sound one at the start of a run, an earlier one where an alert rolls back.

Which rows a step reads follows from its number alone (`llm.training.loader`), so a resumed run sees no row twice.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.training import checkpoint
from llm.training.alerts.monitor import MOST_ROLLBACKS, RollBack
from llm.training.distributed.fsdp import reshard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.runtime import Runtime, restore_runtime
from llm.training.step import Loop, Progress
from llm.training.task import ComputeConfig, TrainingTask


def last_state(
    folder: Path,
    *,
    group: ProcessGroup,
    report: Callable[..., None],
    until: int | None = None,
    start_from: Path | None = None,
) -> checkpoint.TrainingState | None:
    """The last sound checkpoint under `folder`, at step `until` or before, the same one in every process.

    Without one, the state that another training left in the folder `start_from`. Damaged checkpoints are removed.
    """
    path: Path | None = None
    if group.is_main:
        checkpoint.remove_partial(folder)
        path, damaged = checkpoint.newest(folder, until=until)
        for broken in damaged:
            instead = f"goes on from {path.name}" if path is not None else "starts from the beginning"
            report(note=f"checkpoint {broken.name} is damaged and removed: {instead}")
            shutil.rmtree(broken)
        if path is None and start_from is not None:
            path = checkpoint.import_state(folder, start_from)
    found = group.from_main(None if path is None else str(path))
    state = None if found is None else checkpoint.read(checkpoint.copy_to_machines(Path(found), folder, group))
    group.wait()  # until all have read it, since the main process may write that checkpoint again
    return state


def resume(
    facts: dict[str, Any],
    task: TrainingTask,
    compute: ComputeConfig,
    *,
    group: ProcessGroup,
    report: Callable[..., None],
) -> tuple[Runtime, Progress]:
    """The runtime and the progress that a checkpoint with `facts` goes on with.

    InputError where the training does not fit the shorter one that it continues.
    """
    runtime = restore_runtime(facts["choices"], compute, group=group)
    progress = Progress.of(facts["progress"])
    progress.steps = task.steps
    if progress.step == progress.first_step:
        if progress.steps <= progress.step:
            raise InputError(
                f"budget: expected more than the {progress.step} steps that it goes on from, which are part of it, "
                f"got {progress.steps}"
            )
        if (found := task.optimizer.kind) != (expected := facts["optimizer"]):
            raise InputError(f"optimizer.kind: expected {expected!r}, as in the training that it goes on from, got {found!r}")
    before = Runtime(**facts["choices"])
    if before.layout != runtime.layout:
        report(
            note=f"began with {before.layout}, goes on with {runtime.layout}: "
            "what is learned stays the same only up to rounding"
        )
    return runtime, progress


def roll_back(cause: RollBack, loop: Loop, progress: Progress, *, writer: checkpoint.Writer) -> Progress:
    """Restore the checkpoint before the steps of `cause`, and never learn from their rows again.

    InputError where there is none, or too many rollbacks did not help.
    """
    writer.wait()
    undone = range(max(cause.steps.start, progress.first_step), cause.steps.stop)
    state = last_state(writer.folder, group=loop.group, report=loop.report, until=undone.start)
    if state is None:
        raise InputError(f"{cause}; there is no checkpoint to roll back to")
    reshard(loop.learner)  # a validation that was stopped has gathered weights
    checkpoint.restore(state, loop.model, loop.optimizers)
    loop.forget()
    alerts = progress.alerts
    alerts.pass_over(undone)
    restored = Progress.of(state.facts["progress"])
    restored.steps = progress.steps
    restored.alerts.passed, restored.alerts.rollbacks = alerts.passed, [*alerts.rollbacks, cause.finding.steps.start]
    if len(restored.alerts.rollbacks) > MOST_ROLLBACKS:
        raise InputError(f"{cause}; {MOST_ROLLBACKS} rollbacks before it did not help")
    if loop.group.is_main:
        checkpoint.remove_after(writer.folder, restored.step)
    first, last = undone.start, undone.stop - 1
    rows_of = f"step {first}" if first == last else f"steps {first} to {last}"
    loop.report(note=f"{cause}: goes back to step {restored.step}, and past the rows of {rows_of}")
    return restored
