"""One turn of a chat, as the data has it.

This module is imported while planning, so it imports nothing that is slow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm.errors import InputError
from llm.text.reasoning import split_reasoning


@dataclass(frozen=True)
class Turn:
    """One turn of a chat. `parts` alternates between fixed text and text of the row, and begins and ends with fixed text."""

    role: str
    parts: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=dict)  # further fields of the message: `llm.tokenizer.messages`

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message for chat templates."""
        return {"role": self.role, "content": self.content, **self.more}

    @property
    def is_learned(self) -> bool:
        """Whether the loss counts it, if it is the assistant's."""
        return bool(self.more.get("weight", 1) != 0)

    def learned(self, is_learned: bool) -> "Turn":
        """The same turn, learned or not."""
        if is_learned == self.is_learned:
            return self
        return replace(self, more={**self.more, "weight": int(is_learned)})

    def without_reasoning(self) -> "Turn":
        """The same turn without what the assistant wrote before its answer."""
        if self.role != "assistant":
            return self
        parts = self.parts if "reasoning_content" in self.more else (split_reasoning(self.content)[1],)
        return replace(self, parts=parts, more={name: one for name, one in self.more.items() if name != "reasoning_content"})

    def substituted(self) -> tuple[str, ...]:
        """The parts that come from the row."""
        return self.parts[1::2]

    def with_substituted(self, texts: Iterator[str]) -> "Turn":
        """The same turn with its substituted parts replaced by the next of `texts`."""
        return replace(self, parts=tuple(next(texts) if place % 2 else part for place, part in enumerate(self.parts)))


def encodable(text: str, where: str) -> str:
    """`text`; InputError if it holds half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected whole characters in {where}, got {text[error.start]!r}, half of a surrogate pair"
        ) from error
    return text


def json_type(value: object) -> str:
    """The type of a value in the words of JSON."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names.get(type(value), f"a {type(value).__name__}")


def missing_field(row: Mapping[str, Any], field: str) -> str:
    """The words for a row that lacks a field."""
    return f"expected the field {field!r}, got only {', '.join(map(repr, row)) or 'no field at all'}"


def field_text(row: Mapping[str, Any], field: str) -> str:
    """The text or number in a field."""
    if field not in row:
        raise InputError(missing_field(row, field))
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"expected text or a number in {field!r}, got {json_type(value)}")
    if value != value:  # NaN, by which tables mean that there is nothing
        raise InputError(f"expected text or a number in {field!r}, got no number (NaN)")
    try:
        return encodable(str(value), repr(field))
    except ValueError as error:  # of more digits than Python converts
        raise InputError(f"expected text or a number in {field!r}, got a number that is too long: {error}") from error
