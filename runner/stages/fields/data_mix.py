"""Data that is mixed into the rows of a fine-tuning, so that the model does not forget what it learned before.

mix = [
  { tokens = "tokens", share = 0.2 },                                     # of a pack stage with the same tokenizer
  { files = "data/general.jsonl.gz", text = "text", share = 0.1 },        # plain text: loss on all of it
  { files = "data/chat.jsonl.gz", share = 0.1 },                          # prompts and responses, or messages
]
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llm.data.conversations import Template, TextTemplate
from llm.data.row_forms import Format
from runner.artifacts import Checkpoint, Tokens
from runner.input_files import InputFile
from runner.stage import Context, Ref, Semantic, Spec
from runner.stages.fields.data_tables import PromptTemplate, ResponseTemplate, RowTable, TextField, pack_tables
from runner.stages.fields.reading import PartOfRows, Reading, form_of

if TYPE_CHECKING:
    from llm.data.batch import RowSource


class MixTable(Spec):
    """Tokens, text or chats with a share of the rows of a training."""

    share: Semantic[Annotated[float, Field(gt=0, lt=1)]]
    """Share of the training's rows, spread evenly over its steps."""
    tokens: Semantic[Ref[Tokens] | None] = None
    """Tokens of a `pack` stage with the model's tokenizer. Loss is on all of them."""
    files: Semantic[InputFile | None] = None
    """Instead of tokens: files as in `data`; for plain text also .txt, .md, .docx and .pdf."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    split: Semantic[PartOfRows | None] = None
    """The part of the rows: to train, validate or test on."""
    text: Semantic[TextField | None] = None
    """For files of plain text: the field that holds it, or a template over fields. Loss is on all of it."""
    prompt: Semantic[PromptTemplate] = "{prompt}"
    """For files of chats: what the user says, as in `data`."""
    response: Semantic[ResponseTemplate] = "{response}"
    """For files of chats: what the assistant answers; loss is on this alone."""
    messages: Semantic[str | None] = None
    """For files of chats, instead of prompt and response: the field that holds a list of {role, content}."""
    format: Semantic[Format] = "auto"
    """For files of chats without prompt, response and messages: what the rows are, as in `data`."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or go on."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.tokens is None) == (self.files is None):
            raise ValueError("expected either tokens or files" + ("" if self.tokens is None else ", got both"))
        chat = self.messages is not None or (self.prompt, self.response) != ("{prompt}", "{response}")
        if self.tokens is not None and (self.text is not None or chat):
            raise ValueError("expected files beside text, prompt, response and messages, got tokens")
        if self.text is not None and chat:
            raise ValueError("expected either text or the fields of a chat, got both")
        if self.messages is not None and (self.prompt, self.response) != ("{prompt}", "{response}"):
            raise ValueError("expected either messages or prompt and response, got both")
        return self

    @property
    def template(self) -> Template | TextTemplate:
        """How a row of `files` becomes a chat or a document."""
        form = form_of(self.read, self.split)
        if self.text is not None:
            return TextTemplate(self.text, form)
        return Template(self.prompt, self.response, self.messages, form=form, format=self.format)

    def prepare(self, context: Context, base: Checkpoint, name: str, *, positions: int, row_length: int) -> None:
        """Tokenize the files into the folder `name` of scratch, unless it exists."""
        from llm.data.mixture import write_texts
        from llm.errors import InputError
        from llm.tokenizer.tokenizer import TextTokenizer

        if self.tokens is not None:
            made = context.open(self.tokens).tokenizer
            if made.model.read_bytes() != base.tokenizer.model.read_bytes():
                raise InputError(
                    f"mix: expected {str(self.tokens)!r} packed with the tokenizer of the model, got another tokenizer; name "
                    "its files instead, which are tokenized here"
                )
        elif self.text is not None and not (context.scratch / name).exists():
            assert self.files is not None and isinstance(self.template, TextTemplate)
            write_texts(
                context.scratch / name,
                self.files.fetched(),
                self.template,
                tokenizer=TextTokenizer.load(base.tokenizer.folder),
                context=positions,
                skip_bad=self.on_bad_row == "skip",
                report=context.report,
                should_stop=context.should_stop,
            )
        elif self.text is None:
            assert self.files is not None
            table = RowTable(
                files=self.files,
                read=self.read,
                split=self.split,
                prompt=self.prompt,
                response=self.response,
                messages=self.messages,
                format=self.format,
                on_bad_row=self.on_bad_row,
            )
            tokenizer = TextTokenizer.load(base.tokenizer.folder)
            pack_tables(context, name, [table], tokenizer=tokenizer, positions=positions, row_length=row_length)

    def facts(self, context: Context, name: str) -> dict[str, Any]:
        """Metrics for the record: its share, and for files the statistics of their rows."""
        from llm.data.packing import STATISTICS

        if self.tokens is not None:
            return {"share": self.share}
        statistics = json.loads((context.scratch / name / STATISTICS).read_text(encoding="utf-8"))
        return {"share": self.share, "table": statistics["tables"][0]}

    def rows(self, context: Context, name: str, *, positions: int, row_length: int, seed: int) -> "RowSource":
        """The rows that `prepare` wrote, of `row_length`; no document has more than `positions`."""
        from llm.data.mixture import JoinedRows
        from llm.data.packing import PackedRows
        from llm.data.token_rows import TokenRows

        if self.tokens is None and self.text is None:
            return PackedRows(context.scratch / name, seed=seed)
        folder = context.scratch / name if self.tokens is None else context.open(self.tokens).train
        rows = TokenRows(folder, seed=seed, context=positions)
        return rows if row_length == positions else JoinedRows(rows, row_length // positions)
