"""Tables of rows in a recipe, as `sft`, `lora`, `dpo` and `evaluate` name them, and how they are packed for training.

data = [{ files = "data/section.jsonl.gz", prompt = "Which section?\\n{text}", response = "{label}" }]
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm.data.conversations import PreferenceTemplate, Template
from llm.text.templates import split_template, with_field
from runner.input_files import InputFile
from runner.stage import Context, Semantic, Spec

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import TextTokenizer


class RowTable(Spec):
    """Rows of files as prompts and responses, or as messages."""

    files: Semantic[InputFile]
    """Path or glob: .jsonl, .csv or .tsv (also .gz, .zst), or .parquet. As every file of rows or text, it may be one of a
    dataset on the Hub: hf://datasets/OWNER/NAME@COMMIT/PATH, with the whole commit."""
    prompt: Semantic[str] = "{prompt}"
    """What the user says; {name} stands for the field of a row. Of a row too long for the model the end of what was
    substituted here is cut, never the response."""
    response: Semantic[str] = "{response}"
    """What the assistant answers, and the only text that is learned."""
    messages: Semantic[str | None] = None
    """Instead of prompt and response: the field that holds a list of {role, content}."""
    words: Semantic[dict[str, str]] = Field(default_factory=dict)
    """What stands in place of a response that is a label, as { "0" = "no", "1" = "yes" }; by default the label itself."""
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
            raise ValueError("expected either messages or prompt and response, got both")
        return self

    @property
    def template(self) -> Template:
        """How a row becomes the turns of a chat."""
        return Template(self.prompt, self.response, self.messages, tuple(self.words.items()))


class PreferenceTable(Spec):
    """Rows of files as a prompt with an answer that is preferred and one that is not."""

    files: Semantic[InputFile]
    """Path or glob: .jsonl, .csv or .tsv (also .gz, .zst), or .parquet."""
    prompt: Semantic[str] = "{prompt}"
    """What the user says; {name} stands for the field of a row. Where a row is too long for the model its end is cut, for both
    answers alike."""
    chosen: Semantic[str] = "{chosen}"
    """The answer that is preferred."""
    rejected: Semantic[str] = "{rejected}"
    """The answer that is not."""
    messages: Semantic[Annotated[list[str], Field(min_length=2, max_length=2)] | None] = None
    """Instead of prompt, chosen and rejected: the two fields that hold the messages of the preferred chat and of the other, as
    ["chosen", "rejected"]; they differ in the last answer."""
    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the rows per epoch; a fraction keeps rows chosen by the hash of their content."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @field_validator("prompt", "chosen", "rejected")
    @classmethod
    def _is_template(cls, text: str) -> str:
        split_template(text)
        return text

    @field_validator("chosen", "rejected")
    @classmethod
    def _depends_on_the_row(cls, text: str) -> str:
        with_field(text)
        return text

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages is not None and (self.prompt, self.chosen, self.rejected) != ("{prompt}", "{chosen}", "{rejected}"):
            raise ValueError("expected either messages or prompt, chosen and rejected, got both")
        return self

    @property
    def template(self) -> PreferenceTemplate:
        """How a row becomes two chats."""
        fields = (self.messages[0], self.messages[1]) if self.messages is not None else None
        return PreferenceTemplate(self.prompt, self.chosen, self.rejected, fields)


class TrainingTable(RowTable):
    """A table that is gone through more or less often than once."""

    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the rows per epoch; a fraction keeps rows chosen by the hash of their content."""


def pack_tables(
    context: Context,
    name: str,
    tables: Sequence[TrainingTable | RowTable | PreferenceTable],
    *,
    tokenizer: "TextTokenizer",
    positions: int,
    longest_row: int | None = None,
    row_length: int | None = None,
) -> None:
    """Pack `tables` into the folder `name` of scratch, unless it is there."""
    from llm.data.chat_dataset import Table, write_rows

    if (context.scratch / name).exists():
        return
    write_rows(
        context.scratch / name,
        [
            Table(tuple(table.files.fetched()), table.template, getattr(table, "weight", 1.0), table.on_bad_row == "skip")
            for table in tables
        ],
        tokenizer=tokenizer,
        context=positions,
        longest_row=longest_row,
        row_length=row_length,
        report=context.report,
        should_stop=context.should_stop,
    )
