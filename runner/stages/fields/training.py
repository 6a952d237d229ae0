"""The fields that all training stages share, such as batch, budget, schedule and optimizer, and the call of the training loop.

A subclass has the data, and chooses the weights to train.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llm.training.alerts.config import Alerts
from llm.training.config import Budget, Optimizer, Schedule
from runner.stage import Context, Execution, Semantic, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from llm.data.batch import RowSource
    from llm.models.interface import LanguageModel
    from llm.training.loss import Objective
    from llm.training.validation import Validation


class TrainingStage(Stage):
    """A stage that runs the training loop, in as many processes as [parallel] says."""

    imports: ClassVar[tuple[str, ...]] = ("llm.training.trainer",)
    trains: ClassVar[bool] = True

    batch_tokens: Semantic[int] = Field(8192, gt=0)
    """Positions per optimizer step, over all processes and accumulation; rounded down to whole rows."""
    budget: Semantic[Budget] = Budget(epochs=1)
    """How long to train: exactly one of tokens, steps and epochs."""
    schedule: Semantic[Schedule] = Schedule()
    """The learning rate over the training."""
    optimizer: Semantic[Optimizer] = Optimizer()
    """How gradients become updates."""
    seed: Semantic[int] = Field(0, ge=0, lt=2**63)
    """Seed of initialization, data order and dropout; by default the recipe's."""
    micro_batch: Execution[Annotated[int, Field(gt=0)] | Literal["auto"]] = "auto"
    """Rows per forward pass of a process; its rows of a step are accumulated over several passes."""
    recompute: Execution[bool] = False
    """Whether layers are recomputed in the backward pass: less memory, more time."""
    validate_every: Execution[int | None] = Field(None, gt=0)
    """Steps between two validations on held-out rows; the last step is always followed by one."""
    validation_tokens: Execution[int] = Field(262_144, gt=0)
    """Most held-out positions to validate on: an even sample of the held-out rows over sources and lengths, always the
    same."""
    checkpoint_every: Execution[int | None] = Field(None, gt=0)
    """Steps between two training checkpoints."""
    checkpoint_minutes: Execution[float | None] = Field(5.0, gt=0)
    """Minutes between two training checkpoints."""
    keep_checkpoints: Execution[int] = Field(2, gt=0)
    """Training checkpoints to keep, the last ones. An alert that may roll back keeps up to two more."""
    alerts: Execution[Alerts] = Alerts()
    """Alerts while training; fields that are not set here are those of [alerts]. An alert with the action `skip` or `rollback`
    changes the result, and is part of the key."""

    def extra_identity(self) -> dict[str, Any]:
        """The alerts that change the result."""
        changing = self.alerts.semantic_fields()
        return {"alerts": changing} if changing else {}

    attempts: Execution[list[dict[str, Any]]] = Field(default_factory=list)
    """Changes of this stage, as [{ r = 8 }, { r = 4, learning_rate = 1e-3 }]. Each attempt runs up to the evaluations with
    gates, after the one before it failed; the stages behind use the first that passes."""

    @property
    def attempted_changes(self) -> Sequence[Mapping[str, Any]]:
        """The attempts."""
        return self.attempts

    @property
    def holds_out(self) -> bool:
        """Whether its record has a loss on held-out rows."""
        return True

    def learn(
        self,
        context: Context,
        model: "LanguageModel",
        *,
        rows: "RowSource",
        validation: "Validation | None" = None,
        objective: "Objective | None" = None,  # default: cross-entropy of the next token
        check: bool = False,  # before a long training, that new weights can learn at all
        start_from: "Path | None" = None,  # a TrainingState to continue from
        leaves_state: bool = False,  # whether the artifact is a TrainingState
    ) -> dict[str, Any]:
        """Train `model` in place, from a checkpoint in context.scratch if there is one; returns the metrics for the record."""
        from llm.training.loss import next_token_loss
        from llm.training.row_log import RowLog
        from llm.training.task import CheckpointConfig, ComputeConfig, TrainingTask
        from llm.training.trainer import train

        model.recompute = self.recompute
        parallel = context.parallel
        return train(
            model,
            TrainingTask(
                objective or next_token_loss,
                rows,
                budget=self.budget,
                batch_tokens=self.batch_tokens,
                schedule=self.schedule,
                optimizer=self.optimizer,
                seed=self.seed,
                alerts=self.alerts,
            ),
            compute=ComputeConfig(
                cores=context.cores,
                micro_batch=self.micro_batch,
                precision=parallel.precision,
                compiled=parallel.compile,
                fused_attention=parallel.fused_attention,
                strategy=parallel.strategy,
                find_unused_parameters=parallel.find_unused_parameters,
                timeout_minutes=parallel.timeout_minutes,
            ),
            checkpoints=CheckpointConfig(
                context.scratch,
                every=self.checkpoint_every,
                minutes=self.checkpoint_minutes,
                keep=self.keep_checkpoints,
                start_from=start_from,
                leave_in=context.work if leaves_state else None,
            ),
            validation=validation,
            report=context.report,
            should_stop=context.should_stop,
            row_log=RowLog(context.row_log) if context.row_log else None,
            check=check,
        )


def is_main_process() -> bool:
    """Whether this process is the one that writes the artifact."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
