"""Templates that make the turns of a chat from a row: `"Which section?\\n{text}"` and `{"text": ...}` make a user's turn.

A turn keeps which parts of its text come from the row, because only these may be cut if the chat is too long for the model.
This module is imported while planning, so it imports nothing that is slow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.errors import InputError
from llm.text.readers import AS_FOUND, FileFormat
from llm.text.templates import split_template, split_text

ROLES = ("system", "user", "assistant")


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

    def substituted(self) -> tuple[str, ...]:
        """The parts that come from the row."""
        return self.parts[1::2]

    def with_substituted(self, texts: Iterator[str]) -> "Turn":
        """The same turn with its substituted parts replaced by the next of `texts`."""
        return replace(self, parts=tuple(next(texts) if place % 2 else part for place, part in enumerate(self.parts)))


@dataclass(frozen=True)
class Template:
    """Makes turns from a row: by a template of prompt and response, or from the field that holds a list of messages."""

    prompt: str = "{prompt}"
    response: str = "{response}"
    messages: str | None = None
    words: tuple[tuple[str, str], ...] = ()  # (label, text): replaces a response that is a label
    form: FileFormat = AS_FOUND  # of the files

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        if self.messages is not None:
            return {self.messages}
        return {*split_template(self.prompt)[1::2], *split_template(self.response)[1::2]}

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns of `row`; InputError, without the row's place, if it cannot be used."""
        if self.messages is not None:
            turns = list(_turns_of_messages(row, self.messages))
        else:
            turns = [
                Turn("user", _filled(row, split_template(self.prompt), purpose="prompt")),
                Turn("assistant", ("".join(_filled(row, split_template(self.response), purpose="response")),)),
            ]
        return [*turns[:-1], self._label_as_text(turns[-1])] if self.words else turns

    def _label_as_text(self, answer: Turn) -> Turn:
        words = dict(self.words)
        if answer.content not in words:
            raise InputError(f"expected one of the labels in words, {', '.join(map(repr, words))}, got {answer.content!r}")
        return Turn(answer.role, (words[answer.content],))

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The one chat of `row`."""
        return [self.turns(row)]


@dataclass(frozen=True)
class PreferenceTemplate:
    """Makes two chats from a row, which differ in the last answer: the chosen and the rejected one."""

    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    messages: tuple[str, str] | None = None  # instead: the fields with the messages of both chats
    form: FileFormat = AS_FOUND  # of the files

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        return set().union(*(template.fields for template in self._templates()))

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The chosen and the rejected chat of `row`; errors as in `Template.turns`."""
        chosen, rejected = (template.turns(row) for template in self._templates())
        if [turn.message for turn in chosen[:-1]] != [turn.message for turn in rejected[:-1]]:
            raise InputError("expected the same turns before the chosen and the rejected answer, got different ones")
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if turns[-1].role != "assistant":
                raise InputError(f"expected the assistant's turn last in the {name} chat, got the {turns[-1].role}'s")
        if chosen[-1].content == rejected[-1].content:
            raise InputError("expected different chosen and rejected answers, got the same text twice")
        return [chosen, rejected]

    def _templates(self) -> tuple[Template, Template]:
        if self.messages is not None:
            return Template(messages=self.messages[0]), Template(messages=self.messages[1])
        return Template(self.prompt, self.chosen), Template(self.prompt, self.rejected)


@dataclass(frozen=True)
class TextTemplate:
    """Makes a document from a row: one turn of the assistant."""

    text: str = "text"  # a field, or a template
    form: FileFormat = AS_FOUND  # of the files

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        return set(split_text(self.text)[1::2])

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The one turn of `row`; errors as in `Template.turns`."""
        return [Turn("assistant", ("".join(_filled(row, split_text(self.text), purpose="text")),))]

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The one document of `row`."""
        return [self.turns(row)]


def _filled(row: Mapping[str, Any], parts: tuple[str, ...], *, purpose: str) -> tuple[str, ...]:
    filled = tuple(_text(row, part) if place % 2 else part for place, part in enumerate(parts))
    if not "".join(filled).strip():
        raise InputError(f"the {purpose}: expected text, got only white space")
    return filled


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise InputError(f"expected the field {field!r}, got only {', '.join(map(repr, row)) or 'no field at all'}")
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"expected text or a number in {field!r}, got {_json_type(value)}")
    if value != value:  # NaN, by which tables mean that there is nothing
        raise InputError(f"expected text or a number in {field!r}, got no number (NaN)")
    try:
        return _encodable(str(value), repr(field))
    except ValueError as error:  # of more digits than Python converts
        raise InputError(f"expected text or a number in {field!r}, got a number that is too long: {error}") from error


def _encodable(text: str, where: str) -> str:
    """`text`; InputError if it holds half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected whole characters in {where}, got {text[error.start]!r}, half of a surrogate pair"
        ) from error
    return text


def _turns_of_messages(row: Mapping[str, Any], field: str) -> Iterator[Turn]:
    if field not in row:
        raise InputError(f"expected the field {field!r}, got only {', '.join(map(repr, row)) or 'no field at all'}")
    messages = row[field]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"expected a list of messages in {field!r}, got {_json_type(messages)}")
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles:
        raise InputError(f"expected at least one turn of the assistant in {field!r}, got none")
    for number, message in enumerate(messages):
        if roles[number] not in ROLES:
            raise InputError(f"{field}[{number}].role: expected one of {', '.join(ROLES)}, got {roles[number]!r}")
        if not isinstance(content := message.get("content"), str):
            raise InputError(f"{field}[{number}].content: expected text, got {_json_type(content)}")
        _encodable(content, f"{field}[{number}]")
        if roles[number] == "assistant":
            if not content.strip():
                raise InputError(f"{field}[{number}].content: expected the assistant's text, got none")
            yield Turn("assistant", (content,))
        else:
            yield Turn(message["role"], ("", content, ""))


def _json_type(value: object) -> str:
    """The type of a value in the words of JSON."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names.get(type(value), f"a {type(value).__name__}")
