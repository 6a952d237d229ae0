"""Multiple choice: each row has its own answers, and the model chooses the likeliest.

`llm.evaluation.scoring` has classification, where all rows share their labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from llm.data.choices import ChoiceTemplate
from llm.data.truncation import Stream, fit_all
from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, resample, rounded
from llm.evaluation.scoring import Outcome, speeds
from llm.inference.batches import OnProgress
from llm.inference.likelihood import Choice, continuation_likelihoods
from llm.inference.processes import ALONE, Processes
from llm.inference.timer import GenerationTimer
from llm.models.interface import LanguageModel
from llm.text.readers import read_rows
from llm.tokenizer.tokenizer import TextTokenizer


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
