"""Rows that have their own answers, one of them right: the chat of each answer.

This module is imported while planning, so it imports nothing that is slow.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm.data.conversations import Template
from llm.data.turn import Turn
from llm.errors import InputError
from llm.text.readers import AS_FOUND, FileFormat
from llm.text.templates import split_template


@dataclass(frozen=True)
class ChoiceTemplate:
    """Makes a prompt with several answers, one of them right, from a row."""

    prompt: str
    choices: str | tuple[str, ...]  # the field that holds a list of texts, or a template for each
    answer: str  # the field that says which is right
    first: int = 0  # the number of the first choice, if `answer` is a number
    form: FileFormat = AS_FOUND

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        if isinstance(self.choices, str):
            return {*split_template(self.prompt)[1::2], self.choices, self.answer}
        return {self.answer}.union(*(split_template(one)[1::2] for one in (self.prompt, *self.choices)))

    @property
    def columns(self) -> set[str]:
        """The same."""
        return self.fields

    def read(self, row: Mapping[str, Any]) -> tuple[list[list[Turn]], int]:
        """A chat for each choice, and the index of the right one; InputError if the row cannot be used.

        Choices may also be {"text": [...], "label": [...]}. The answer is a choice's text, label, letter or number.
        """
        labels: Sequence[Any] = ()
        if isinstance(self.choices, str):
            texts: Any = row.get(self.choices)
            if isinstance(texts, Mapping):
                labels, texts = texts.get("label", ()), texts.get("text")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"expected a list of texts in {self.choices!r}, got {str(texts)[:80]!r}")
            templates = ["{choice}"] * len(texts)
        else:
            texts, templates = [None] * len(self.choices), list(self.choices)
        if len(texts) < 2:
            raise InputError(f"expected at least two choices, got {len(texts)}")
        chats = [
            Template(self.prompt, template).turns(row if text is None else {**row, "choice": text})
            for text, template in zip(texts, templates, strict=True)
        ]
        return chats, self._right_index(row, [chat[-1].content for chat in chats], labels)

    def chats(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """The chat of each choice; errors as in `read`."""
        return self.read(row)[0]

    def _right_index(self, row: Mapping[str, Any], texts: Sequence[str], labels: Sequence[Any]) -> int:
        if self.answer not in row:
            raise InputError(f"expected the field {self.answer!r}, got only {', '.join(map(repr, row))}")
        answer = row[self.answer]
        text = str(answer).strip()
        if isinstance(answer, str):
            for names in (labels, texts, string.ascii_uppercase[: len(texts)]):
                if text in list(names):
                    return list(names).index(text)
        number = int(text) - self.first if text.isdecimal() and not isinstance(answer, bool) else -1
        if 0 <= number < len(texts):
            return number
        raise InputError(
            f"field {self.answer!r}: expected the text or letter of one of {len(texts)} choices, or a number "
            f"from {self.first} to "
            f"{self.first + len(texts) - 1}, got {answer!r}"
        )
