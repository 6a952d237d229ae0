"""Tables of rows in a recipe, as `sft`, `lora` and `evaluate` name them, and what makes packed rows for training of them.

data = [{ files = "data/section.jsonl.gz", prompt = "Which section?\\n{text}", response = "{label}" }]
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm.templates import split_template, with_field
from llm.turns import Template
from runner.artifacts import Checkpoint
from runner.stage import Context, InputFile, Metrics, Semantic, Spec
from runner.stages.training import TrainingStage

if TYPE_CHECKING:
    from torch import nn

    from llm.validation import Validation

_ROWS, _VALIDATION_ROWS = "rows", "validation-rows"  # in scratch
LEAST_ROWS = 4  # in a step, if rows are made longer than a chat


class RowTable(Spec):
    """Rows of files as prompts and responses, or as messages."""

    files: Semantic[InputFile]
    """Path or glob: .jsonl (also .gz, .zst), .csv or .parquet."""
    prompt: Semantic[str] = "{prompt}"
    """What the user says; {name} stands for the field of a row. Of a row too long for the model the end of what was
    substituted here is cut, never the response."""
    response: Semantic[str] = "{response}"
    """What the assistant answers, and the only text that is learned."""
    messages: Semantic[str | None] = None
    """Instead of prompt and response: the field that holds a list of {role, content}."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @field_validator("prompt", "response")
    @classmethod
    def _is_template(cls, text: str) -> str:
        split_template(text)
        return text

    @field_validator("response")
    @classmethod
    def _depends_on_the_row(cls, response: str) -> str:
        with_field(response)
        return response

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        # Compared with the defaults, since a resolved recipe writes those out.
        if self.messages is not None and (self.prompt, self.response) != ("{prompt}", "{response}"):
            raise ValueError("wants either messages or prompt and response, found both")
        return self

    @property
    def template(self) -> Template:
        """How a row becomes the turns of a chat."""
        return Template(self.prompt, self.response, self.messages)


class TrainingTable(RowTable):
    """A table that is gone through more or less often than once."""

    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the rows per epoch; a fraction keeps rows chosen by the hash of their content."""


class RowTraining(TrainingStage):
    """A training on rows, from a checkpoint; a kind of its own only where a subclass gives one."""

    data: Semantic[Annotated[list[TrainingTable], Field(min_length=1)]]
    """What to learn from. Loss is on the assistant's text and the end of its turns."""
    validation: Semantic[list[TrainingTable]] = Field(default_factory=list)
    """Rows held out, to look at while training; nothing is learned from them."""
    context: Semantic[Annotated[int, Field(gt=0)] | None] = None
    """Positions of a chat; by default as many as the model has. Longer chats are cut to it."""

    @property
    def holds_out(self) -> bool:
        """Whether its record tells the loss on held-out rows."""
        return bool(self.validation)

    def pack(self, context: Context, base: Checkpoint) -> None:
        """Tokenize and pack the tables for `base`, in one process and without torch; what a run before this did is kept."""
        from llm.chat import Table, write_rows
        from llm.errors import InputError
        from llm.tokenizer import TextTokenizer

        most: int = json.loads(base.config.read_text(encoding="utf-8"))["max_position_embeddings"]
        if self.context is not None and self.context > most:
            raise InputError(f"context wants at most {most}, the positions of the model; found {self.context}")
        tokenizer = TextTokenizer.load(base.tokenizer.folder)
        for name, tables in ((_ROWS, self.data), (_VALIDATION_ROWS, self.validation)):
            if tables and not (context.scratch / name).exists():
                write_rows(
                    context.scratch / name,
                    [
                        Table(tuple(table.files.matches()), table.template, table.weight, table.on_bad_row == "skip")
                        for table in tables
                    ],
                    tokenizer=tokenizer,
                    context=self.context or most,
                    longest_row=max(self.context or most, self.batch_tokens // LEAST_ROWS),
                    report=context.report,
                    should_stop=context.should_stop,
                )

    def held_out(self, context: Context) -> "Validation | None":
        """The rows of `validation`, as `pack` made them."""
        from llm.chat import ChatRows
        from llm.validation import Validation

        if not self.validation:
            return None
        return Validation(ChatRows(context.scratch / _VALIDATION_ROWS, seed=None), tokens=self.validation_tokens)

    def learn_rows(self, context: Context, model: "nn.Module") -> dict[str, Any]:
        """Train `model` in place on what `pack` made; returns the metrics for the record, those of the rows among them."""
        from llm.chat import STATISTICS, ChatRows

        def read(name: str) -> Metrics:
            statistics: Metrics = json.loads((context.scratch / name / STATISTICS).read_text(encoding="utf-8"))
            return statistics

        rows = ChatRows(context.scratch / _ROWS, seed=self.seed)
        metrics = self.learn(context, model, rows=rows, validation=self.held_out(context)) | {"data": read(_ROWS)}
        return metrics | ({"validation_data": read(_VALIDATION_ROWS)} if self.validation else {})
