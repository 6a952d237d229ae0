"""Multiple choice: which of a row's own answers a model finds likeliest. Classification, where all rows share their labels, is
`llm.evaluation.scoring`'s.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.batch import IGNORE
from llm.data.conversations import Template, Turn
from llm.data.truncation import fit_all
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, resample, rounded
from llm.evaluation.scoring import Outcome
from llm.inference.generate import GenerationTimer
from llm.inference.likelihood import OnProgress, Window, negative_log_likelihoods
from llm.models.interface import LanguageModel
from llm.text.readers import read_rows
from llm.text.templates import split_template
from llm.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ChoiceTemplate:
    """How a row becomes a prompt with several answers, one of them right."""

    prompt: str
    choices: str | tuple[str, ...]  # the field that holds a list of texts, or a template for each
    answer: str  # the field that says which is right
    first: int = 0  # what a number there counts from

    @property
    def fields(self) -> set[str]:
        """The fields of a row that it reads."""
        own = (
            {self.choices}
            if isinstance(self.choices, str)
            else set().union(*(split_template(one)[1::2] for one in self.choices))
        )
        return {*split_template(self.prompt)[1::2], *own, self.answer}

    def read(self, row: Mapping[str, Any]) -> tuple[list[list[Turn]], int]:
        """A chat for each choice, and which is right; an InputError says what the row lacks.

        Choices may also be {"text": [...], "label": [...]}. The answer is the text or the label of one, a letter, or a number.
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
        return chats, self._right(row, [chat[-1].content for chat in chats], labels)

    def _right(self, row: Mapping[str, Any], texts: Sequence[str], labels: Sequence[Any]) -> int:
        if self.answer not in row:
            raise InputError(f"expected the field {self.answer!r}, got only {', '.join(map(repr, row))}")
        answer = row[self.answer]
        said = str(answer).strip()
        if isinstance(answer, str):
            for names in (labels, texts, string.ascii_uppercase[: len(texts)]):
                if said in list(names):
                    return list(names).index(said)
        number = int(said) - self.first if said.isdecimal() and not isinstance(answer, bool) else -1
        if 0 <= number < len(texts):
            return number
        raise InputError(
            f"expected in {self.answer!r} the text or letter of one of {len(texts)} choices, or a number from {self.first} to "
            f"{self.first + len(texts) - 1}, got {answer!r}"
        )


@dataclass(frozen=True)
class Choice:
    """A row: a chat for each answer, and which of them is right."""

    place: str
    chats: Sequence[Sequence[Turn]]
    right: int


def read_choices(files: Sequence[Path], template: ChoiceTemplate, *, skip_bad: bool) -> tuple[list[Choice], int]:
    """The rows of `files`, and how many were skipped because they cannot be used."""
    found, skipped = [], 0
    for row in read_rows(files, template.fields):
        try:
            found.append(Choice(row.at, *template.read(row.fields())))
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{row.at}: {error}") from error
            skipped += 1
    return found, skipped


def choose(model: LanguageModel, tokenizer: TextTokenizer, *, questions: Sequence[Choice], progress: OnProgress) -> Outcome:
    """`accuracy` of taking the likeliest choice, and `accuracy_per_byte` where its log-probability is divided by its bytes.

    A prompt that does not fit the model beside the longest choice is cut as in training.
    """
    windows, owners = [], []
    cut = 0
    for number, question in enumerate(questions):
        streams = _streams(question, tokenizer, model.context)
        cut += any(stream.cut_prompt for stream in streams)
        for stream in streams:
            start = stream.answer_start
            windows.append(Window(stream.ids[:-1], [IGNORE] * (start - 1) + stream.ids[start:]))
            owners.append(number)
    timer = GenerationTimer()
    nats = iter(negative_log_likelihoods(model, windows, timer=timer, progress=progress))
    hits: dict[str, list[float]] = {"accuracy": [], "accuracy_per_byte": []}
    wrong = []
    for number, question in enumerate(questions, start=1):
        texts = [chat[-1].content for chat in question.chats]
        losses = [next(nats) for _ in texts]
        found = losses.index(min(losses))
        hits["accuracy"].append(float(found == question.right))
        per_byte = [loss / len(text.encode()) for loss, text in zip(losses, texts, strict=True)]
        hits["accuracy_per_byte"].append(float(per_byte.index(min(per_byte)) == question.right))
        if found != question.right:
            prompt = "\n".join(turn.content for turn in question.chats[0][:-1])
            behind = round(losses[question.right] - losses[found], 3)
            wrong.append(
                {
                    "row": number,
                    "prompt": prompt,
                    "wanted": texts[question.right],
                    "found": texts[found],
                    "nats_behind": behind,
                }
            )
    total = len(questions)

    def scores(draws: Resamples) -> dict[str, float]:
        return {name: float(draws @ np.array(of_one)) / total for name, of_one in hits.items()}

    facts = {
        "chance": round(sum(1 / len(question.chats) for question in questions) / total, 4),
        "cut_prompts": cut,
        "prompt_tokens": timer.prompt_tokens,
        "prompt_tokens_per_second": round(timer.prompt_tokens / timer.prompt_seconds),
    }
    return Outcome(rounded(scores(np.ones(total))), total, wrong, facts, values=dict(hits), replicates=resample(total, scores))


def _streams(question: Choice, tokenizer: TextTokenizer, context: int) -> list[Any]:
    try:
        encoded = [tokenizer.encode_chat([turn.message for turn in chat]) for chat in question.chats]
        streams = fit_all(question.chats, encoded, tokenizer, positions=context)
    except InputError as error:
        raise InputError(f"{question.place}: {error}") from error
    if any(stream.cut_response for stream in streams):
        raise InputError(f"{question.place}: a choice does not fit the model's context of {context:,} tokens")
    return streams
