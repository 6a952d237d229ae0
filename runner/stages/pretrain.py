"""The kind `pretrain`: a model with fresh weights learns to predict the next token of packed text."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from llm.settings import Budget, Schedule
from runner.artifacts import Checkpoint, TrainingState
from runner.graph import changes, plain
from runner.stage import Context, Execution, Metrics, Ref, Semantic, Stage
from runner.stages.pretraining import Pretraining
from runner.stages.trunk import Trunk

SHARED = ("architecture", "batch_tokens", "optimizer", "seed")  # fields that a training has in common with its trunk


class Pretrain(Pretraining, kind="pretrain", version=1, makes=Checkpoint):
    """Trains a model from nothing on packed text."""

    trunk: Semantic[Ref[TrainingState] | None] = None
    """Of a "wsd" schedule: the trunk that it goes on from, which has the first steps of its budget behind it."""
    keep_trunk: Execution[bool] = True
    """Whether a training with a "wsd" schedule that names no trunk gets one, the stage `NAME-trunk`, so that a longer budget
    or another decay goes on from it; only with a budget of tokens or steps. What is learned is the same."""

    def faults_beside(self, stages: Mapping[str, Stage]) -> Iterator[str]:
        """What differs from its trunk that may not."""
        trunk = stages[self.trunk] if self.trunk is not None else None
        if not isinstance(trunk, Trunk):
            return
        name = str(self.trunk)
        if self.schedule.kind != "wsd":
            yield f'schedule.kind: wants "wsd" beside a trunk, found {self.schedule.kind!r}'
        for change in changes(_shared(trunk), _shared(self)):
            field, _, difference = change.partition(": ")
            wanted, _, found = difference.partition(" -> ")
            yield f"{field}: wants {wanted} as in its trunk {name!r}, found {found}"
        steps, behind = self.steps(stages), trunk.steps(stages)
        if steps is not None and behind is not None and not behind <= self.schedule.descent(steps):
            yield (
                f"trunk: wants one of at most {self.schedule.descent(steps)} steps, since from there on the rate goes down; "
                f"{name!r} has {behind}"
            )

    def parted(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """Its trunk, where it should have one and does not, and itself, going on from it."""
        steps = self.steps(stages)
        if self.trunk is not None or not self.keep_trunk or self.schedule.kind != "wsd" or steps is None:
            return {name: self}
        until, rate = self.schedule.descent(steps), self.schedule
        if not rate.warmup_steps < until < steps:
            return {name: self}
        trunk = next(free for number in count(1) if (free := f"{name}-trunk" + f"-{number}" * (number > 1)) not in stages)
        changed = {
            "budget": Budget(steps=until),
            "schedule": Schedule(kind="constant", learning_rate=rate.learning_rate, warmup_steps=rate.warmup_steps),
            "attempts": [],
        }
        stable = Trunk(**{field: getattr(self, field) for field in Trunk.model_fields} | changed)
        return {trunk: stable, name: self.model_copy(update={"trunk": Ref.to(TrainingState, trunk)})}

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint."""
        beginning = None
        if self.trunk is not None:
            state, tokens = context.open(self.trunk), context.open(self.tokens)
            if state.tokenizer.model.read_bytes() != tokens.tokenizer.model.read_bytes():
                from llm.errors import InputError

                raise InputError(f"tokens: wants the tokenizer of {str(self.trunk)!r}; {str(self.tokens)!r} has another one")
            beginning = state.folder
        return self.learn_text(context, beginning=beginning)


def _shared(stage: Pretraining) -> dict[str, Any]:
    fields = plain(stage)
    rate = {"learning_rate": stage.schedule.learning_rate, "warmup_steps": stage.schedule.warmup_steps}
    return {name: fields[name] for name in SHARED} | {"schedule": rate}
