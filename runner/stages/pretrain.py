"""The kinds `pretrain` and `trunk`: a model, with fresh weights or those of a checkpoint, learns to predict packed text.

A trunk is the part of a "wsd" schedule before the learning rate goes down. It keeps its optimizer state, so that trainings
with a longer budget or another decay continue from it.
"""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from llm.models import architecture_tables, architectures
from llm.training.config import Budget, Schedule
from runner.artifacts import Checkpoint, Tokens, TrainingState
from runner.graph import changes, plain
from runner.stage import Context, Execution, Metrics, Ref, Semantic, Stage
from runner.stages.fields.packed_text import ReplayTable, check_tokenizer, held_out_text, replayed
from runner.stages.fields.stored_dtype import resolve_dtype
from runner.stages.fields.training import TrainingStage, is_main_process
from runner.stages.pack import Pack

if TYPE_CHECKING:
    from pathlib import Path

    from llm.models.interface import LanguageModel
    from llm.models.interface import ModelConfig as ArchitectureConfig
else:
    ArchitectureConfig = architecture_tables()


class Pretraining(TrainingStage):
    """A training of a new model, of a checkpoint on further text, or of a trunk from where it stopped."""

    tokens: Semantic[Ref[Tokens]]
    """The text to learn from, as tokens; its tokenizer is stored in the checkpoint."""
    architecture: Semantic[ArchitectureConfig | None] = None
    """The new model: `name` is one of the registered architectures, the other fields are its sizes."""
    base: Semantic[Ref[Checkpoint] | None] = None
    """Instead of an architecture: the model to go on from (continued pretraining). `tokens` is packed with its tokenizer, and
    its weights keep the precision in which they are stored; they are trained in fp32."""
    mix: Semantic[list[ReplayTable] | None] = None
    """Other tokens to learn from, such as general text beside that of a domain: each has a share of the rows of every step."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.architecture is None) == (self.base is None):
            missing = "architecture or base: is missing"
            raise ValueError(missing if self.base is None else "expected either architecture or base, got both")
        if (total := sum(table.share for table in self.mix or ())) >= 1:
            raise ValueError(f"mix: expected shares with a sum below 1, since tokens has the rest, got {total:g}")
        return self

    def steps(self, stages: "Mapping[str, Stage]") -> int | None:
        """The number of optimizer steps; None if it depends on how many tokens there will be."""
        if self.budget.steps is not None or self.budget.epochs is not None:
            return self.budget.steps
        pack = stages.get(self.tokens)
        if not isinstance(pack, Pack) or not (rows := self.batch_tokens // pack.context):
            return None
        return self.budget.in_steps(batch_tokens=rows * pack.context, rows_per_step=rows, rows_per_epoch=rows)

    def learn_text(self, context: Context, *, start_from: "Path | None", leaves_state: bool = False) -> dict[str, Any]:
        """Train the model, or continue from `start_from`, and write the checkpoint; returns the metrics."""
        from llm.data.token_rows import TokenRows
        from llm.models.checkpoint import save_checkpoint

        tokens = context.open(self.tokens)
        rows = TokenRows(tokens.train, seed=self.seed)
        model = self._fresh_model(tokens, rows.context) if self.base is None else self._model_of_base(context, rows.context)
        metrics = self.learn(
            context,
            model,
            rows=replayed(context, rows, self.mix or (), seed=self.seed, tokenizer=tokens.tokenizer),
            validation=held_out_text(tokens, rows.context, most=self.validation_tokens, every=self.validate_every),
            check=self.base is None,
            start_from=start_from,
            leaves_state=leaves_state,
        )
        if is_main_process():
            base = None if self.base is None else context.open(self.base).folder
            # What is trained further is stored as it was trained.
            dtype = None if base is None or leaves_state else resolve_dtype("base", base)
            save_checkpoint(context.work, model, base or tokens.tokenizer.folder, dtype=dtype)
        return metrics

    def _fresh_model(self, tokens: Tokens, length: int) -> "LanguageModel":
        """A new model for rows of `length` tokens."""
        import torch

        from llm.errors import InputError
        from llm.tokenizer.tokenizer import TextTokenizer

        assert self.architecture is not None  # without a base
        config = self.architecture.with_context(length)
        if config.resolved_context < length:
            raise InputError(
                f"architecture.context: expected at least the {length} tokens of a row of {str(self.tokens)!r}, "
                f"got {config.resolved_context}"
            )
        torch.manual_seed(self.seed)
        vocab_size = TextTokenizer.load(tokens.tokenizer.folder).vocab_size
        return architectures()[config.name].build(config, vocab_size=vocab_size)

    def _model_of_base(self, context: Context, length: int) -> "LanguageModel":
        """The model to go on from, for rows of `length` tokens of its tokenizer."""
        from llm.errors import InputError
        from llm.models.checkpoint import load_checkpoint

        assert self.base is not None
        base = context.open(self.base)
        check_tokenizer(context, self.tokens, base.tokenizer, place="tokens", owner=str(self.base))
        model = load_checkpoint(base.folder)
        if model.context < length:
            raise InputError(
                f"base: expected a model of at least the {length} tokens of a row of {str(self.tokens)!r}, "
                f"got one of {model.context}"
            )
        return model


SHARED = ("architecture", "base", "batch_tokens", "optimizer", "seed")  # fields that must be equal in a training and its trunk


class Pretrain(Pretraining, kind="pretrain", version=2, makes=Checkpoint):
    """Trains a new model, or a checkpoint further, on packed text."""

    trunk: Semantic[Ref[TrainingState] | None] = None
    """For a "wsd" schedule: the trunk to continue from, which has done the first steps of the budget."""
    keep_trunk: Execution[bool] = True
    """Whether a training with a "wsd" schedule and no `trunk` gets one, the stage `NAME-trunk`, from which trainings with a
    longer budget or another decay continue. Needs a budget of tokens or steps. The result is the same."""

    def faults_among(self, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Fields that differ from those of its trunk, but must not."""
        trunk = stages[self.trunk] if self.trunk is not None else None
        if not isinstance(trunk, Trunk):
            return
        name = str(self.trunk)
        if self.schedule.kind != "wsd":
            yield f'schedule.kind: expected "wsd" beside a trunk, got {self.schedule.kind!r}'
        for change in changes(_shared(trunk), _shared(self)):
            field, _, difference = change.partition(": ")
            expected, _, got = difference.partition(" -> ")
            yield f"{field}: expected {expected} as in its trunk {name!r}, got {got}"
        steps, done = self.steps(stages), trunk.steps(stages)
        if steps is not None and done is not None and not done <= self.schedule.descent(steps):
            yield (
                f"trunk: expected at most {self.schedule.descent(steps)} steps, where the rate starts to go down, got {done} "
                f"in {name!r}"
            )

    def expanded(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """Its trunk, if it should have one but does not, and itself, continuing from it."""
        steps = self.steps(stages)
        if self.trunk is not None or not self.keep_trunk or self.schedule.kind != "wsd" or steps is None:
            return {name: self}
        until, schedule = self.schedule.descent(steps), self.schedule
        if not schedule.warmup_steps < until < steps:
            return {name: self}
        trunk = next(free for number in count(1) if (free := f"{name}-trunk" + f"-{number}" * (number > 1)) not in stages)
        changed = {
            "budget": Budget(steps=until),
            "schedule": Schedule(kind="constant", learning_rate=schedule.learning_rate, warmup_steps=schedule.warmup_steps),
            "attempts": [],
        }
        first_steps = Trunk(**{field: getattr(self, field) for field in Trunk.model_fields} | changed)
        return {trunk: first_steps, name: self.model_copy(update={"trunk": Ref.to(TrainingState, trunk)})}

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint."""
        start_from = None
        if self.trunk is not None:
            state = context.open(self.trunk)
            check_tokenizer(context, self.tokens, state.tokenizer, place="tokens", owner=str(self.trunk))
            start_from = state.folder
        return self.learn_text(context, start_from=start_from)


def _shared(stage: Pretraining) -> dict[str, Any]:
    fields = plain(stage)
    rate = {"learning_rate": stage.schedule.learning_rate, "warmup_steps": stage.schedule.warmup_steps}
    return {name: fields[name] for name in SHARED if name in fields} | {"schedule": rate}


class Trunk(Pretraining, kind="trunk", version=2, makes=TrainingState):
    """Trains a model at a constant learning rate, and keeps the optimizer state for trainings that continue from it."""

    @model_validator(mode="after")
    def _open_ended(self) -> Self:
        if self.schedule.kind != "constant":
            raise ValueError(f'schedule.kind: expected "constant" for a trunk, got {self.schedule.kind!r}')
        if self.budget.epochs is not None:
            raise ValueError("budget: expected tokens or steps for a trunk, got epochs")
        return self

    @property
    def holds_out(self) -> bool:
        """False: its record has no loss on held-out rows, which it only measures on the way."""
        return False

    def expanded(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """The trunk with its budget in steps."""
        steps = self.steps(stages)
        return {name: self if steps is None else self.model_copy(update={"budget": type(self.budget)(steps=steps)})}

    def reusable_work(self, mine: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """The steps of a shorter trunk; 0 if an alert may roll back to before its end."""
        steps: int | None = other["fields"].get("budget", {}).get("steps")
        alike = {**other, "fields": {**other["fields"], "budget": mine["fields"]["budget"]}} == mine
        if steps is None or self.budget.steps is None or not alike or self.alerts.does("rollback"):
            return 0
        return steps if steps < self.budget.steps else 0

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint with its training state."""
        return self.learn_text(context, start_from=context.beginning, leaves_state=True)
