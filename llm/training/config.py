"""The tables of a recipe that say how a model learns: budget, learning rate schedule, optimizer. Numbers only, no torch."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigTable(BaseModel):
    """A table of a recipe: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


MOST = 10**15  # tokens or steps; more than any training has, and few enough for a float to count


class Budget(ConfigTable):
    """How long to train: exactly one of tokens, steps and epochs."""

    tokens: int | None = Field(None, gt=0, le=MOST)
    """Positions to compute, padding included: the number of steps is this over batch_tokens, rounded up."""
    steps: int | None = Field(None, gt=0, le=MOST)
    """Optimizer steps."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; a fraction is allowed."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        named = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) if named else "none of them"
            raise ValueError(f"expected exactly one of tokens, steps and epochs, got {found}")
        return self

    def in_steps(self, *, batch_tokens: int, rows_per_step: int, rows_per_epoch: int) -> int:
        """The number of optimizer steps, at least one."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens / batch_tokens)
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * rows_per_epoch / rows_per_step))


class Schedule(ConfigTable):
    """The learning rate over a training: linear warm-up, then a curve down to the minimum."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After warm-up: half a cosine, a straight line, no change, or warm-up-stable-decay (constant, then a line down)."""
    learning_rate: float = Field(1e-3, gt=0)
    """The highest, reached at the end of warm-up. Of AdamW; see optimizer.muon_learning_rate."""
    min_learning_rate: float = Field(0.0, ge=0)
    """What the curve ends at."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from near 0; step 0 already learns."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Of "wsd": the share of all steps, at the end, in which the rate goes down."""
    decay_steps: int | None = Field(None, gt=0)
    """Of "wsd": how many steps these are, instead of a share."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected at most learning_rate, got {self.min_learning_rate} above {self.learning_rate}"
            )
        return self

    def descent(self, steps: int) -> int:
        """The step of `steps` from which on the rate goes down; before it, the rate does not depend on `steps`."""
        warmup = min(self.warmup_steps, steps)
        if self.kind == "constant":
            return steps
        if self.kind != "wsd":
            return warmup
        decay = math.ceil(self.decay_fraction * steps) if self.decay_steps is None else self.decay_steps
        return max(warmup, steps - decay)

    def factor(self, step: int, *, steps: int) -> float:
        """Learning rate at `step` (from 0) of `steps`, as a share of the highest."""
        warmup = min(self.warmup_steps, steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        least = self.min_learning_rate / self.learning_rate
        start = self.descent(steps)
        if step < start:
            return 1.0
        progress = (step - start) / max(1, steps - start)  # 1 would be the step after the last
        curve = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return least + (1 - least) * curve


class Optimizer(ConfigTable):
    """How gradients become updates."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's mean of squares."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled, times the learning rate; on matrices inside the layers and a head of its own, not on embeddings and norms."""
    gradient_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; a longer one is scaled down to it. 0 turns clipping off."""
    muon_learning_rate: float = Field(0.02, gt=0)
    """Muon's highest rate; it follows the same schedule."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's Nesterov momentum."""
