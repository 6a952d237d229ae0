"""How files are read that do not tell it themselves, and which part of their rows:
`read = { encoding = "gb18030", delimiter = ";", sheet = "Data" }`, `split = { part = "test", stratify = "label" }`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from llm.text.readers import FileFormat
from llm.text.readers.split import Split
from runner.stage import Semantic, Spec


def _known(encoding: str) -> str:
    try:
        "".encode(encoding)
    except LookupError:
        raise ValueError(
            f"expected an encoding that Python knows, such as gb18030, cp1252 or utf-16, got {encoding!r}"
        ) from None
    return encoding


class Reading(Spec):
    """How to read files."""

    encoding: Semantic[Annotated[str, AfterValidator(_known)] | None] = None
    """Encoding of text files. By default that of a byte order mark, else UTF-8 for JSON; that of other text is found."""
    delimiter: Semantic[Annotated[str, Field(min_length=1, max_length=1)] | None] = None
    """Separator of .csv files; by default the one of comma, semicolon, tab and | that fits the first rows."""
    sheet: Semantic[str | None] = None
    """Sheet of .xlsx, .xls and .ods files; by default the first."""


class PartOfRows(Spec):
    """A part of the rows of a table, so that training, validation and test need no files of their own. Tables that share files
    share everything here but `part`. Which part a row is in depends on the rows, not on their order.
    """

    part: Semantic[Literal["train", "validation", "test"]]
    """The part that this table reads."""
    validation: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.1
    """Share of the rows to validate on."""
    test: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.1
    """Share of the rows to test on."""
    stratify: Semantic[str | None] = None
    """The field of a label: the rows of each are split by themselves, and of a rare one at least one is tested."""
    group: Semantic[str | None] = None
    """A field: rows with the same value, such as a patient's, are in the same part. By default equal rows are."""
    time: Semantic[str | None] = None
    """A field with a number or a date like 2026-05-17: the last rows by it are tested, and those before them validated. By
    default a hash decides."""

    @model_validator(mode="after")
    def _leaves_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"expected shares with a sum below 1, since train has the rest, got {self.validation + self.test:g}"
            )
        return self

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it names."""
        return {name for name in (self.stratify, self.group, self.time) if name is not None}


def form_of(read: Reading | None, split: PartOfRows | None = None) -> FileFormat:
    """Both as `llm.text.readers` takes them."""
    given = read or Reading()
    part = None if split is None else Split(**split.model_dump())
    return FileFormat(given.encoding, given.delimiter, given.sheet, part)
