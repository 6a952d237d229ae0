"""One row of a file, as it was read, and its fields."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from llm.errors import InputError


class RowFault(str):
    """Why a row cannot be read, in place of its content."""


class FileRow(NamedTuple):
    """One row as read: a line of JSON not yet parsed, fields, or the reason why it cannot be read."""

    place: str  # the file, or the dataset
    number: int  # line of the file (row of a table without lines, or of a dataset), from 1
    content: bytes | dict[str, Any] | RowFault

    @property
    def at(self) -> str:
        """Its place, for messages."""
        return f"{self.place}:{self.number}"

    def fields(self) -> Mapping[str, Any]:
        """The row parsed; InputError, without the place, if that fails."""
        content = self.content
        if isinstance(content, RowFault):
            raise InputError(content)
        if isinstance(content, dict):
            return content
        try:
            fields = parsed(content.decode())
        except UnicodeDecodeError as error:
            raise InputError(not_utf8(error, f"byte {error.start + 1}: ")) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"expected one JSON object per line, got a line that is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"expected one JSON object per line, got a {type(fields).__name__}")
        return fields


def parsed(text: str) -> Any:
    """The value of a JSON text; ValueError, also for NaN, which is no JSON, and for numbers of thousands of digits."""
    return json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name: str) -> NoReturn:
    """ValueError: JSON has no such number, and as text it would be learned as a word."""
    raise ValueError(f"expected a number, got {name}; write null where there is no value")


def not_utf8(error: UnicodeDecodeError, place: str = "") -> str:
    """The message for bytes that are not UTF-8."""
    return f'expected UTF-8, got other bytes ({place}{error.reason}); name the encoding: read = {{ encoding = "gb18030" }}'
