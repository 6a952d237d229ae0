"""Training on tables of rows, for `sft`, `lora` and `dpo`: packing the rows, mixing others into them, and training on them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from runner.artifacts import Checkpoint
from runner.stage import Context, Semantic
from runner.stages.fields.data_mix import MixTable
from runner.stages.fields.data_tables import PreferenceTable, TrainingTable, pack_tables
from runner.stages.fields.training import TrainingStage

if TYPE_CHECKING:
    from llm.data.batch import RowSource
    from llm.data.class_weights import ClassWeights
    from llm.models.interface import LanguageModel
    from llm.training.loss import Objective
    from llm.training.validation import Validation

ROWS, VALIDATION_ROWS = "rows", "validation-rows"  # in scratch
MIN_ROWS = 4  # in a step, if rows are longer than a chat


class PackedTraining(TrainingStage):
    """A training of a checkpoint on packed rows; a subclass has the tables."""

    context: Semantic[Annotated[int, Field(gt=0)] | None] = None
    """Maximum positions of a chat; longer ones are cut. By default those of the model, and rows are no longer than the longest
    chat needs."""

    reasoning: Semantic[Literal["all", "last", "none"]] = "all"
    """Of which answers the reasoning is learned (`reasoning_content`, or `<think>` in the text): of all, each with the chat
    before it as the chat template writes it at inference; of the last one of a chat; or of none."""
    learn_empty_think: Semantic[bool] = False
    """Whether a model that reasons also learns the empty think block that its template writes before an answer without
    reasoning, so that it answers at once without being asked to."""

    def tables(self) -> tuple[Sequence[TrainingTable | PreferenceTable], Sequence[TrainingTable | PreferenceTable]]:
        """The tables to learn from, and the held-out ones."""
        raise NotImplementedError

    @property
    def weights_of_classes(self) -> "ClassWeights | None":
        """How often the targets of each label count."""
        return None

    @property
    def holds_out(self) -> bool:
        """Whether its record has a loss on held-out rows."""
        return bool(self.tables()[1])

    def positions(self, base: Checkpoint) -> int:
        """The maximum positions of a chat; InputError if `base` has fewer."""
        from llm.errors import InputError

        most: int = json.loads(base.config.read_text(encoding="utf-8"))["max_position_embeddings"]
        if self.context is not None and self.context > most:
            raise InputError(f"context: expected at most {most}, the positions of the model, got {self.context}")
        return self.context or most

    def pack(self, context: Context, base: Checkpoint) -> None:
        """Tokenize and pack the tables for `base`, in one process and without torch; tables that are packed are kept."""
        from llm.data.packing import PackedRows
        from llm.tokenizer.tokenizer import TextTokenizer

        positions = self.positions(base)
        tokenizer = TextTokenizer.load(base.tokenizer.folder)
        if self.learn_empty_think:
            tokenizer = tokenizer.with_empty_think_learned()
        lengths: dict[str, Any] = {
            "reasoning": self.reasoning,
            "follow_lengths": self.context is None,
            "longest_row": self.batch_tokens // MIN_ROWS,
        }
        for name, tables in zip((ROWS, VALIDATION_ROWS), self.tables(), strict=True):
            if tables:
                weights = self.weights_of_classes if name == ROWS else None
                pack_tables(context, name, tables, tokenizer=tokenizer, positions=positions, class_weights=weights, **lengths)
                # A held-out chat is cut where a learned one would be, so that memory suffices for it, too.
                positions = min(positions, PackedRows(context.scratch / name, seed=None).context)

    def held_out(self, context: Context, *, watched: Sequence[str] = ()) -> "Validation | None":
        """The held-out rows, which `pack` wrote; None if there are none."""
        from llm.data.packing import PackedRows
        from llm.training.validation import Validation

        if not self.tables()[1]:
            return None
        rows = PackedRows(context.scratch / VALIDATION_ROWS, seed=None)
        names = [f"table-{number}" for number in range(1, len(self.tables()[1]) + 1)]
        return Validation(rows, sources=names, tokens=self.validation_tokens, every=self.validate_every, watched=watched)

    def own_rows(self, context: Context) -> "RowSource":
        """The rows to learn from, which `pack` wrote."""
        from llm.data.packing import PackedRows

        return PackedRows(context.scratch / ROWS, seed=self.seed)

    def learn_rows(
        self,
        context: Context,
        model: "LanguageModel",
        *,
        mixture: "Sequence[tuple[RowSource, float]]" = (),  # with the share of each in all rows
        objective: "Objective | None" = None,
        watched: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Train `model` in place on its rows; returns the metrics for the record, with the statistics of packing."""
        from llm.data.mixture import mixed
        from llm.data.packing import STATISTICS

        rows = mixed(self.own_rows(context), mixture)
        held_out = self.held_out(context, watched=watched)
        metrics = self.learn(context, model, rows=rows, validation=held_out, objective=objective)
        for field, name in (("data", ROWS), ("validation_data", VALIDATION_ROWS)):
            if (path := context.scratch / name / STATISTICS).exists():
                metrics[field] = json.loads(path.read_text(encoding="utf-8"))
        return metrics


class RowTraining(PackedTraining):
    """A training on prompts and responses, or on chats."""

    data: Semantic[Annotated[list[TrainingTable], Field(min_length=1)]]
    """The rows to learn from. Loss is on the assistant's text and the end of its turns."""
    validation: Semantic[list[TrainingTable]] = Field(default_factory=list)
    """Held-out rows, to measure the loss on while training."""
    class_weights: Semantic[Literal["balanced"] | dict[str, Annotated[float, Field(gt=0, le=1000)]] | None] = None
    """How much rows of each label count in the loss: "balanced", so that rare labels count as much as frequent ones, or by
    label, such as { urgent = 5.0 }; others count 1. The loss on held-out rows counts all rows alike."""
    mix: Semantic[list[MixTable]] = Field(default_factory=list)
    """Other data to learn from, against forgetting: each has a share of the rows of every step."""

    @field_validator("mix")
    @classmethod
    def _leave_room(cls, mix: list[MixTable]) -> list[MixTable]:
        if (total := sum(table.share for table in mix)) >= 1:
            raise ValueError(f"expected shares with a sum below 1, since data has the rest, got {total:g}")
        return mix

    @property
    def weights_of_classes(self) -> "ClassWeights | None":
        """How often the targets of each label count."""
        return self.class_weights

    def tables(self) -> tuple[list[TrainingTable], list[TrainingTable]]:
        """The tables to learn from, and the held-out ones."""
        return self.data, self.validation

    def prepare_rows(self, context: Context, base: Checkpoint) -> None:
        """Pack the tables, and then the data of `mix` into rows of the same length."""
        self.pack(context, base)
        if self.mix:
            row_length = self.own_rows(context).context
            positions = min(row_length, self.positions(base))
            for number, table in enumerate(self.mix):
                table.prepare(context, base, f"mix-{number}", positions=positions, row_length=row_length)

    def learn_mixed(self, context: Context, model: "LanguageModel", base: Checkpoint) -> dict[str, Any]:
        """`learn_rows` with `mix`, which the metrics include."""
        metrics = self.learn_rows(context, model, mixture=self.mixture(context, base))
        if self.mix:
            metrics["mix"] = [table.facts(context, f"mix-{number}") for number, table in enumerate(self.mix)]
        return metrics

    def mixture(self, context: Context, base: Checkpoint) -> "list[tuple[RowSource, float]]":
        """The rows of each table of `mix`, with its share."""
        if not self.mix:
            return []
        row_length = self.own_rows(context).context
        positions = min(row_length, self.positions(base))
        return [
            (table.rows(context, f"mix-{number}", positions=positions, row_length=row_length, seed=self.seed), table.share)
            for number, table in enumerate(self.mix)
        ]
