"""A row of data as the turns of a chat, by a template: `"Which section?\\n{text}"` and `{"text": ...}` make a user's turn.

Nothing here knows tokens. A turn remembers which of its text was substituted from the row, because only that may be cut
when a row is too long for a model. This module is imported while planning, so it imports nothing that is slow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm.errors import InputError
from llm.text.templates import split_template, split_text

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one role says. `parts` alternates between fixed text and text of the row, and begins and ends with fixed text."""

    role: str
    parts: tuple[str, ...]

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    @property
    def message(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.content}

    def substituted(self) -> tuple[str, ...]:
        """The parts that came from the row."""
        return self.parts[1::2]

    def with_substituted(self, texts: Iterator[str]) -> "Turn":
        """The same turn with as many of `texts` as it has substituted parts in their place."""
        return Turn(self.role, tuple(next(texts) if place % 2 else part for place, part in enumerate(self.parts)))


@dataclass(frozen=True)
class Template:
    """How a row becomes turns: a prompt and a response as templates, or the field that holds a list of messages."""

    prompt: str = "{prompt}"
    response: str = "{response}"
    messages: str | None = None
    words: tuple[tuple[str, str], ...] = ()  # what stands for each response, which is a label then

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        if self.messages is not None:
            return {self.messages}
        return {*split_template(self.prompt)[1::2], *split_template(self.response)[1::2]}

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns of `row`; an InputError says what it lacks, and leaves it to the caller to say where the row is."""
        if self.messages is not None:
            turns = list(_turns_of_messages(row, self.messages))
        else:
            turns = [
                Turn("user", _filled(row, split_template(self.prompt), purpose="prompt")),
                Turn("assistant", ("".join(_filled(row, split_template(self.response), purpose="response")),)),
            ]
        return [*turns[:-1], self._in_words(turns[-1])] if self.words else turns

    def _in_words(self, answer: Turn) -> Turn:
        words = dict(self.words)
        if answer.content not in words:
            raise InputError(f"expected a label of words, {', '.join(map(repr, words))}, got {answer.content!r}")
        return Turn(answer.role, (words[answer.content],))

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The one chat of `row`."""
        return [self.turns(row)]


@dataclass(frozen=True)
class PreferenceTemplate:
    """How a row becomes two chats that differ in the last answer: the chosen one and the rejected one."""

    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    messages: tuple[str, str] | None = None  # instead: the fields with the messages of the chosen and of the rejected chat

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        return set().union(*(template.fields for template in self._templates()))

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The chosen and the rejected chat of `row`; errors as of `Template.turns`."""
        chosen, rejected = (template.turns(row) for template in self._templates())
        if [turn.message for turn in chosen[:-1]] != [turn.message for turn in rejected[:-1]]:
            raise InputError("expected the same turns before the chosen and the rejected answer, got others")
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if turns[-1].role != "assistant":
                raise InputError(f"expected the assistant's turn last in the {name} chat, got the {turns[-1].role}'s")
        if chosen[-1].content == rejected[-1].content:
            raise InputError("expected two different answers; the chosen and the rejected one are the same")
        return [chosen, rejected]

    def _templates(self) -> tuple[Template, Template]:
        if self.messages is not None:
            return Template(messages=self.messages[0]), Template(messages=self.messages[1])
        return Template(self.prompt, self.chosen), Template(self.prompt, self.rejected)


@dataclass(frozen=True)
class TextTemplate:
    """How a row becomes a document: the turn of an assistant, and nothing before it."""

    text: str = "text"  # a field, or a template

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        return set(split_text(self.text)[1::2])

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The one turn of `row`; errors as of `Template.turns`."""
        return [Turn("assistant", ("".join(_filled(row, split_text(self.text), purpose="text")),))]

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The one document of `row`."""
        return [self.turns(row)]


def _filled(row: Mapping[str, Any], parts: tuple[str, ...], *, purpose: str) -> tuple[str, ...]:
    filled = tuple(_text(row, part) if place % 2 else part for place, part in enumerate(parts))
    if not "".join(filled).strip():
        raise InputError(f"the {purpose} is empty: it was filled with nothing but white space")
    return filled


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise InputError(f"expected the field {field!r}, got only {', '.join(map(repr, row)) or 'no field at all'}")
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"expected a text or a number in {field!r}, got {_name_of_type(value)}")
    return _encodable(str(value), repr(field))


def _encodable(text: str, where: str) -> str:
    """`text`, unless it holds what JSON can write and UTF-8 cannot: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected a text of whole characters in {where}, got {text[error.start]!r}, half of a surrogate pair"
        ) from error
    return text


def _turns_of_messages(row: Mapping[str, Any], field: str) -> Iterator[Turn]:
    if field not in row:
        raise InputError(f"expected the field {field!r}, got only {', '.join(map(repr, row)) or 'no field at all'}")
    messages = row[field]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"expected a list of messages in {field!r}, got {_name_of_type(messages)}")
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if "assistant" not in roles:
        raise InputError(f"expected at least one turn of the assistant in {field!r}, got none to learn from")
    for number, message in enumerate(messages):
        if roles[number] not in ROLES:
            raise InputError(f"expected a role of {', '.join(ROLES)} in {field}[{number}], got {roles[number]!r}")
        if not isinstance(content := message.get("content"), str):
            raise InputError(f"expected a text as content of {field}[{number}], got {_name_of_type(content)}")
        _encodable(content, f"{field}[{number}]")
        if roles[number] == "assistant":
            if not content.strip():
                raise InputError(f"the assistant's turn {field}[{number}] is empty")
            yield Turn("assistant", (content,))
        else:
            yield Turn(message["role"], ("", content, ""))


def _name_of_type(value: object) -> str:
    """What a value is, in the words of JSON."""
    names = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names.get(type(value), f"a {type(value).__name__}")
