"""Templates that make the turns of a chat from a row: `"Which section?\\n{text}"` and `{"text": ...}` make a user's turn.

Without a template, rows are read in the forms of `llm.data.row_forms`. This module is imported while planning, so it imports
nothing that is slow.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm.data.messages import turns_of_messages
from llm.data.row_forms import Format, read_chat, read_preference
from llm.data.turn import Turn, field_text, json_type, missing_field
from llm.errors import InputError
from llm.text.readers import AS_FOUND, FileFormat
from llm.text.templates import split_template, split_text

LIST = "list"
NONE = "none"  # the label of a row that has no label, where rows may have several


@dataclass(frozen=True)
class Template:
    """Makes turns from a row: by a template of prompt and response, from the field that holds a list of messages, or else as
    the names of the row's fields tell.
    """

    prompt: str = "{prompt}"
    response: str = "{response}"
    messages: str | None = None
    words: tuple[tuple[str, str], ...] = ()  # (label, text): replaces a response that is a label
    form: FileFormat = AS_FOUND  # of the files
    format: Format = "auto"  # of the rows, if neither templates nor messages are given
    several: str | None = None  # rows have several labels: LIST, or what separates them in a text

    @property
    def is_recognised(self) -> bool:
        """Whether the names of a row's fields tell what it is."""
        return self.messages is None and (self.prompt, self.response) == ("{prompt}", "{response}")

    @property
    def fields(self) -> set[str]:
        """The fields that a row must have."""
        if self.is_recognised:
            return set()
        if self.messages is not None:
            return {self.messages}
        return {*split_template(self.prompt)[1::2], *split_template(self.response)[1::2]}

    @property
    def columns(self) -> set[str] | None:
        """The fields of a row that it reads; None for all."""
        return None if self.is_recognised or self.messages is not None else self.fields

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns of `row`; InputError, without the row's place, if it cannot be used."""
        if self.messages is not None:
            if self.messages not in row:
                raise InputError(missing_field(row, self.messages))
            turns = turns_of_messages(row, self.messages)
        elif self.is_recognised:
            turns = read_chat(row, self.format)
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
        """The one chat of `row`; of a row with several labels, a chat for each."""
        if self.several is None:
            return [self.turns(row)]
        name, one = split_template(self.response)[1], replace(self, several=None)
        return [one.turns({**row, name: label}) for label in labels_of(row, name, self.several) or [NONE]]


def labels_of(row: Mapping[str, Any], field: str, several: str) -> list[str]:
    """The distinct labels in a field: a list, also as JSON in a text, or a text in which `several` separates them; InputError
    for anything else.
    """
    if field not in row:
        raise InputError(missing_field(row, field))
    value = row[field]
    if isinstance(value, str) and several == LIST and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"expected a list of labels in {field!r}, got text that is no JSON: {error}") from error
    if isinstance(value, list | tuple):
        found = [field_text({field: label}, field) for label in value]
    elif several == LIST:
        raise InputError(f"expected a list of labels in {field!r}, got {json_type(value)}")
    else:
        found = [] if value is None or value != value else field_text(row, field).split(several)
    return [label for label in dict.fromkeys(label.strip() for label in found) if label]


@dataclass(frozen=True)
class PreferenceTemplate:
    """Makes two chats from a row, which differ in the last answer: the chosen and the rejected one. Without templates, as the
    names of the row's fields tell.
    """

    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    messages: tuple[str, str] | None = None  # instead: the fields with the messages of both chats
    form: FileFormat = AS_FOUND  # of the files

    @property
    def is_recognised(self) -> bool:
        """Whether the names of a row's fields tell what it is."""
        return self.messages is None and (self.prompt, self.chosen, self.rejected) == ("{prompt}", "{chosen}", "{rejected}")

    @property
    def fields(self) -> set[str]:
        """The fields that a row must have."""
        if self.is_recognised:
            return {"chosen", "rejected"}
        return set().union(*(template.fields for template in self._templates()))

    @property
    def columns(self) -> set[str] | None:
        """The fields of a row that it reads; None for all."""
        return None if self.is_recognised or self.messages is not None else self.fields

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The chosen and the rejected chat of `row`; errors as in `Template.turns`."""
        if self.is_recognised:
            chosen, rejected = read_preference(row)
        else:
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

    @property
    def columns(self) -> set[str]:
        """The same."""
        return self.fields

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The one turn of `row`; errors as in `Template.turns`."""
        return [Turn("assistant", ("".join(_filled(row, split_text(self.text), purpose="text")),))]

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The one document of `row`."""
        return [self.turns(row)]


def _filled(row: Mapping[str, Any], parts: tuple[str, ...], *, purpose: str) -> tuple[str, ...]:
    filled = tuple(field_text(row, part) if place % 2 else part for place, part in enumerate(parts))
    if not "".join(filled).strip():
        raise InputError(f"the {purpose}: expected text, got only white space")
    return filled
