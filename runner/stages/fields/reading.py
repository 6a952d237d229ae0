"""How to read files that do not tell it themselves: `read = { encoding = "gb18030", delimiter = ";", sheet = "Data" }`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from llm.text.readers import FileFormat
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

    @property
    def form(self) -> FileFormat:
        """As `llm.text.readers` takes it."""
        return FileFormat(self.encoding, self.delimiter, self.sheet)


AS_FOUND = Reading()
