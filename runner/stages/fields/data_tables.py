"""Tables of rows in a recipe, as `sft`, `lora`, `dpo` and `evaluate` have them, and how they are packed for training.

data = [{ files = "data/section.jsonl.gz", prompt = "Which section?\\n{text}", response = "{label}" }]
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from llm.data.conversations import NONE, PreferenceTemplate, Template
from llm.data.row_forms import Format
from llm.text.templates import split_template, split_text, with_field
from runner.input_files import InputFile
from runner.stage import Context, Semantic, Spec
from runner.stages.fields.reading import PartOfRows, Reading, form_of

if TYPE_CHECKING:
    from llm.data.chat_parts import Reasoning
    from llm.data.class_weights import ClassWeights
    from llm.tokenizer.tokenizer import TextTokenizer


def _passes(check: Callable[[str], Any]) -> AfterValidator:
    """A text stays as it is, unless `check` raises a ValueError."""

    def validate(text: str) -> str:
        check(text)
        return text

    return AfterValidator(validate)


TextField = Annotated[str, _passes(split_text)]  # a field, or a template over fields
PromptTemplate = Annotated[str, _passes(split_template)]
ResponseTemplate = Annotated[str, _passes(with_field)]  # with a field, so that rows differ


OnBadRow = Literal["fail", "skip"]
NO_LABEL = NONE  # the label of a row that has none of several


class RowTable(Spec):
    """Rows of files as prompts and responses, or as messages."""

    files: Semantic[InputFile]
    """Path, glob or folder: .jsonl, .json, .csv, .tsv (also .gz, .zst), .xlsx, .ods or .parquet. Like every file of rows or
    text, it may be in a dataset on the Hub: hf://datasets/OWNER/NAME@COMMIT/PATH, with the full commit."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    split: Semantic[PartOfRows | None] = None
    """The part of the rows: to train, validate or test on."""
    prompt: Semantic[PromptTemplate] = "{prompt}"
    """What the user says; {name} stands for the field of a row. If a row is too long for the model, the end of what was
    substituted here is cut, never the response."""
    response: Semantic[ResponseTemplate] = "{response}"
    """What the assistant answers: the text that is learned or scored."""
    messages: Semantic[str | None] = None
    """Instead of prompt and response: the field that holds a list of {role, content}, or ShareGPT's {from, value}."""
    format: Semantic[Format] = "auto"
    """Without prompt, response and messages, what the rows are: "pairs" (prompt and response or completion, question and
    answer), "messages" (OpenAI's, with tools and tool_calls), "sharegpt" (conversations), or "alpaca" (instruction, input,
    output); "auto" goes by the names of their fields."""
    words: Semantic[dict[str, str]] = Field(default_factory=dict)
    """Words in place of responses that are labels, as { "0" = "no", "1" = "yes" }; by default the label itself."""
    multi_label: Semantic[Annotated[str, Field(min_length=1)] | None] = None
    """Rows have several labels, or none, in the field of the response: "list", or what separates them in a text, such as ";".
    Each label of a row is learned after its prompt, all of them together as much as the one label of another row."""
    on_bad_row: Semantic[OnBadRow] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @model_validator(mode="after")
    def _one_field_of_labels(self) -> Self:
        if self.multi_label is not None and (self.messages is not None or len(split_template(self.response)) != 3):
            raise ValueError('multi_label: expected a response with one field, as response = "{labels}", got another')
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        # Compared with the defaults, since a resolved recipe writes those out.
        if self.messages is not None and (self.prompt, self.response) != ("{prompt}", "{response}"):
            raise ValueError("expected either messages or prompt and response, got both")
        if self.format != "auto" and not self.template.is_recognised:
            raise ValueError("expected format without prompt, response and messages, got both")
        return self

    @property
    def template(self) -> Template:
        """How a row becomes the turns of a chat."""
        form = form_of(self.read, self.split)
        words = tuple(self.words.items())
        return Template(self.prompt, self.response, self.messages, words, form, self.format, self.multi_label)


class PreferenceTable(Spec):
    """Rows of files as a prompt with a preferred answer and a rejected one."""

    files: Semantic[InputFile]
    """Path, glob or folder: .jsonl, .json, .csv, .tsv (also .gz, .zst), .xlsx, .ods or .parquet."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    split: Semantic[PartOfRows | None] = None
    """The part of the rows: to train, validate or test on."""
    prompt: Semantic[PromptTemplate] = "{prompt}"
    """What the user says; {name} stands for the field of a row. If a row is too long for the model, the end of what was
    substituted here is cut, for both answers alike."""
    chosen: Semantic[ResponseTemplate] = "{chosen}"
    """The preferred answer. If none of prompt, chosen, rejected and messages is given, each may be a text or messages, and the
    prompt a field of its own (prompt, messages, question, instruction) or the beginning of both answers, as in TRL."""
    rejected: Semantic[ResponseTemplate] = "{rejected}"
    """The rejected answer."""
    messages: Semantic[Annotated[list[str], Field(min_length=2, max_length=2)] | None] = None
    """Instead of prompt, chosen and rejected: the two fields that hold the messages of the preferred and of the rejected chat,
    as ["chosen", "rejected"]; the chats differ in the last answer."""
    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the rows per epoch; a fraction keeps rows chosen by the hash of their content."""
    on_bad_row: Semantic[OnBadRow] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages is not None and (self.prompt, self.chosen, self.rejected) != ("{prompt}", "{chosen}", "{rejected}"):
            raise ValueError("expected either messages or prompt, chosen and rejected, got both")
        return self

    @property
    def template(self) -> PreferenceTemplate:
        """How a row becomes two chats."""
        fields = (self.messages[0], self.messages[1]) if self.messages is not None else None
        return PreferenceTemplate(self.prompt, self.chosen, self.rejected, fields, form_of(self.read, self.split))


class TrainingTable(RowTable):
    """Rows to learn from, each as often as `weight` says."""

    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the rows per epoch; a fraction keeps rows chosen by the hash of their content."""
    long: Semantic[Literal["cut", "window", "fail"]] = "cut"
    """What to do with a row that is longer than the context: cut the end of what was filled into its prompt; or, for documents
    to classify, learn one window after the other of it, each with the same response; or take it as a row that cannot be
    used."""


def pack_tables(
    context: Context,
    name: str,
    tables: Sequence[TrainingTable | RowTable | PreferenceTable],
    *,
    tokenizer: "TextTokenizer",
    positions: int,
    reasoning: "Reasoning" = "all",
    follow_lengths: bool = False,
    longest_row: int | None = None,
    row_length: int | None = None,
    class_weights: "ClassWeights | None" = None,
) -> None:
    """Pack `tables` into the folder `name` of scratch, unless it exists."""
    from llm.data.chat_dataset import write_rows
    from llm.data.chat_parts import Table
    from llm.text.executor import LocalProcesses

    if (context.scratch / name).exists():
        return
    write_rows(
        context.scratch / name,
        [
            Table(
                tuple(table.files.fetched()),
                table.template,
                getattr(table, "weight", 1.0),
                skip_bad=table.on_bad_row == "skip",
                reasoning=reasoning,
                long=getattr(table, "long", "cut"),
            )
            for table in tables
        ],
        tokenizer=tokenizer,
        context=positions,
        follow_lengths=follow_lengths,
        longest_row=longest_row,
        row_length=row_length,
        class_weights=class_weights,
        executor=LocalProcesses(context.cores),
        report=context.report,
        should_stop=context.should_stop,
    )
