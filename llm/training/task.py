"""What a training is asked to do: what is learned, how it is computed, and what is kept of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm.data.batch import RowSource
from llm.errors import InputError
from llm.training.alerts.config import Alerts
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.loss import Objective

CHECKPOINTS = "checkpoints"  # in scratch


@dataclass(frozen=True)
class TrainingTask:
    """What is learned: from the same weights, these values alone lead to the same weights, up to rounding."""

    objective: Objective
    rows: RowSource
    budget: Budget
    batch_tokens: int  # per optimizer step, over all processes and accumulation; rounded down to whole rows
    schedule: Schedule
    optimizer: Optimizer
    seed: int
    alerts: Alerts = field(default_factory=Alerts)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_tokens // self.rows.context

    @property
    def tokens_per_step(self) -> int:
        """Positions of an optimizer step."""
        return self.rows_per_step * self.rows.context

    @property
    def steps(self) -> int:
        """Optimizer steps, with those of the training that this one continues."""
        return self.budget.in_steps(
            batch_tokens=self.tokens_per_step, rows_per_step=self.rows_per_step, rows_per_epoch=self.rows.rows_per_epoch
        )

    def check(self, *, processes: int) -> None:
        """InputError where there are no rows, or a step has fewer rows than `processes`."""
        if not self.rows.rows_per_epoch:
            raise InputError("training: expected at least one row to learn from, got none")
        if self.rows_per_step < processes:
            raise InputError(
                f"batch_tokens: expected at least one row of {self.rows.context} tokens for each of {processes} processes, "
                f"got {self.batch_tokens}"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """How it is computed: this decides speed and memory, and changes what is learned only by rounding.

    What is "auto" is decided once, from the machine and the size of the training, and kept in its checkpoints.
    """

    cores: int  # of this machine, shared by its processes
    micro_batch: int | Literal["auto"] = "auto"  # rows per forward pass of a process
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compiled: bool | Literal["auto"] = "auto"  # layers by torch.compile
    fused_attention: bool | Literal["auto"] = "auto"  # by `llm.layers.fused_attention`
    strategy: Literal["ddp", "fsdp"] = "ddp"  # of several processes
    find_unused_parameters: bool = False  # under "ddp"
    timeout_minutes: float = 30.0  # for which processes wait for each other


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk, where and how often."""

    scratch: Path  # this training's own folder: it continues from what is there
    every: int | None = None  # steps
    minutes: float | None = None
    keep: int = 2  # the last ones
    start_from: Path | None = None  # the folder in which a shorter training left its state, for this one to continue
    leave_in: Path | None = None  # a folder for the state that a longer training needs to continue from the end of this one

    @property
    def folder(self) -> Path:
        """Where checkpoints are."""
        return self.scratch / CHECKPOINTS
