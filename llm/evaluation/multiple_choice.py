"""Multiple choice: each row has its own answers, and the model chooses the likeliest.

`llm.evaluation.scoring` has classification, where all rows share their labels.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.conversations import Template, Turn
from llm.data.truncation import Stream, fit_all
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, resample, rounded
from llm.evaluation.scoring import Outcome, speeds
from llm.inference.batches import OnProgress
from llm.inference.likelihood import Choice, continuation_likelihoods
from llm.inference.processes import ALONE, Processes
from llm.inference.timer import GenerationTimer
from llm.models.interface import LanguageModel
from llm.text.readers import AS_FOUND, FileFormat, read_rows
from llm.text.templates import split_template
from llm.tokenizer.tokenizer import TextTokenizer


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


@dataclass(frozen=True)
class ChoiceQuestion:
    """A row: a chat for each answer, and the index of the right one."""

    place: str
    chats: Sequence[Sequence[Turn]]
    right: int


def read_choices(files: Sequence[Path], template: ChoiceTemplate, *, skip_bad: bool) -> tuple[list[ChoiceQuestion], int]:
    """The usable rows of `files`, and the number of skipped ones."""
    found, skipped = [], 0
    for row in read_rows(files, template.fields, template.form):
        try:
            found.append(ChoiceQuestion(row.at, *template.read(row.fields())))
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{row.at}: {error}") from error
            skipped += 1
    return found, skipped


def score_choices(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[ChoiceQuestion],
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Outcome:
    """`accuracy` of the likeliest choice, and `accuracy_per_byte` with log-probabilities divided by the choices' bytes.

    The prompt is computed once for all choices. One that does not fit the context with the longest choice is cut as in
    training.
    """
    streams = [_streams(question, tokenizer, model.context) for question in questions]
    choices = [_choices(of_row) for of_row in streams]
    timer = GenerationTimer()
    whole = list(chain.from_iterable(choices))
    found = iter(continuation_likelihoods(model, whole, timer=timer, processes=processes, progress=progress))
    hits: dict[str, list[float]] = {"accuracy": [], "accuracy_per_byte": []}
    wrong = []
    for number, (question, of_row) in enumerate(zip(questions, choices, strict=True), start=1):
        texts = [chat[-1].content for chat in question.chats]
        losses = [-likelihood for _ in of_row for likelihood in next(found)]
        chosen = losses.index(min(losses))
        hits["accuracy"].append(float(chosen == question.right))
        per_byte = [loss / len(text.encode()) for loss, text in zip(losses, texts, strict=True)]
        hits["accuracy_per_byte"].append(float(per_byte.index(min(per_byte)) == question.right))
        if chosen != question.right:
            wrong.append(
                {
                    "row": number,
                    "prompt": "\n".join(turn.content for turn in question.chats[0][:-1]),
                    "wanted": texts[question.right],
                    "found": texts[chosen],
                    "nats_behind": round(losses[question.right] - losses[chosen], 3),
                }
            )
    total = len(questions)

    def score(draws: Resamples) -> dict[str, float]:
        return {name: float(draws @ np.array(of_rows)) / total for name, of_rows in hits.items()}

    facts = {
        "chance": round(sum(1 / len(question.chats) for question in questions) / total, 4),
        "cut_prompts": sum(any(stream.cut_prompt for stream in of_row) for of_row in streams),
        **speeds(timer),
    }
    return Outcome(rounded(score(np.ones(total))), total, wrong, facts, values=dict(hits), replicates=resample(total, score))


def _choices(streams: Sequence[Stream]) -> list[Choice]:
    """The chats of a row: one choice, unless the beginning of an answer has changed how its prompt splits into tokens."""
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for stream in streams:
        by_prompt.setdefault(tuple(stream.ids[: stream.answer_start]), []).append(stream.ids[stream.answer_start :])
    if len(by_prompt) == 1:
        return [Choice(prompt, answers) for prompt, answers in by_prompt.items()]
    return [Choice(stream.ids[: stream.answer_start], [stream.ids[stream.answer_start :]]) for stream in streams]


def _streams(question: ChoiceQuestion, tokenizer: TextTokenizer, context: int) -> list[Stream]:
    try:
        encoded = [tokenizer.encode_chat([turn.message for turn in chat]) for chat in question.chats]
        streams = fit_all(question.chats, encoded, tokenizer, positions=context)
    except InputError as error:
        raise InputError(f"{question.place}: {error}") from error
    if any(stream.cut_response for stream in streams):
        raise InputError(
            f"{question.place}: expected choices that fit the model's context of {context:,} tokens, got a longer one"
        )
    return streams
