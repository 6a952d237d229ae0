"""Scores of a model on held-out data: likelihood of text, and answers. `llm.evaluation.classification` scores labels.

Every function returns an `Outcome`: scores that depend only on model and data (rounded, so that the order in which cores add
numbers does not show), and facts such as speeds, which depend on the machine and are only recorded. `llm.inference.likelihood`
computes the likelihoods.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.data.batch import IGNORE
from llm.data.truncation import Stream, fit
from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, resample, round_all, rounded
from llm.evaluation.chrf_bleu import ChrfBleu
from llm.inference.batches import OnProgress
from llm.inference.generate import generate
from llm.inference.likelihood import Window, negative_log_likelihoods
from llm.inference.processes import ALONE, Processes
from llm.inference.timer import GenerationTimer
from llm.models.interface import LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

SAMPLES = 20  # answers kept as examples
GRAM = 4  # tokens; seq-rep-4 of Welleck et al. (2020)
# From where on answers look collapsed: perplexity does not tell it, since it reads the expected answers.
SHORT, REPEATED, SAME = 0.25, 0.3, 0.5  # of the expected length; more than in expected answers; of all answers


@dataclass(frozen=True)
class Question:
    """A chat whose last turn is the expected answer; `place` is its file:line."""

    place: str
    turns: Sequence[Turn]
    labels: tuple[str, ...] = ()  # all expected ones, where rows have several labels

    @property
    def expected(self) -> str:
        """The text of the expected answer."""
        return self.turns[-1].content

    def with_answer(self, text: str) -> "Question":
        """The same question with another expected answer."""
        return replace(self, turns=[*self.turns[:-1], Turn("assistant", (text,))])


@dataclass(frozen=True)
class Outcome:
    """The result of one task."""

    scores: dict[str, float]
    rows: int
    examples: list[dict[str, Any]] = field(default_factory=list)  # wrong rows, or samples
    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)  # by name, one per row
    replicates: dict[str, list[float]] = field(default_factory=dict)  # by score, its value in each resample of the rows


@dataclass(frozen=True)
class Likelihoods:
    """Negative log-likelihoods of texts or answers, in nats, with their lengths in tokens and bytes; one entry each."""

    nats: list[float]
    tokens: list[int]
    text_bytes: list[int]

    @cached_property
    def _columns(self) -> npt.NDArray[np.float64]:
        return np.array([self.nats, self.tokens, self.text_bytes], dtype=np.float64)

    def score(self, draws: Resamples) -> dict[str, float]:
        """`perplexity` per token and `bits_per_byte`; each entry counts as often as it was drawn."""
        nats, tokens, text_bytes = (self._columns @ draws).tolist()
        return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes}

    @property
    def scores(self) -> dict[str, float]:
        """The scores of all entries; InputError if the model's likelihoods are not finite."""
        if not math.isfinite(sum(self.nats)):
            raise InputError("the model's likelihoods are not finite: its weights are damaged, or its training diverged")
        return rounded(self.score(np.ones(len(self.nats))))

    @property
    def values(self) -> dict[str, list[Any]]:
        """The entries, for the artifact."""
        return {"nats": round_all(self.nats), "tokens": self.tokens, "bytes": self.text_bytes}


def score_texts(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    texts: Sequence[str],
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Outcome:
    """`perplexity` per token and `bits_per_byte` of whole documents, with the end token of each.

    A document longer than the model's context is split into windows without overlap; each token is scored once, given the
    tokens before it in its window.
    """
    context = model.context
    documents = [
        [Window(ids[at : at + context], ids[at + 1 : at + context + 1]) for at in range(0, len(ids) - 1, context)]
        for ids in tokenizer.encode_documents(texts)
    ]
    timer = GenerationTimer()
    windows = [window for document in documents for window in document]
    nats = iter(negative_log_likelihoods(model, windows, timer=timer, processes=processes, progress=progress))
    found = Likelihoods(
        nats=[sum(next(nats) for _ in document) for document in documents],
        tokens=[sum(len(window.targets) for window in document) for document in documents],
        text_bytes=[len(text.encode()) for text in texts],
    )
    replicates = resample(len(texts), found.score)
    return Outcome(found.scores, len(texts), facts=speeds(timer), values=found.values, replicates=replicates)


def score_answers(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Outcome:
    """`perplexity` and `bits_per_byte` of the expected answers after their prompts, and of the model's greedy answers `chrf`
    and `bleu` (0 to 100) against them, `length_ratio`, their tokens over those of the expected ones as far as these may be as
    long, and `repetition`. With `max_new_tokens` 0 nothing is generated. Facts have `warnings` where answers look collapsed.

    An answer that does not fit the context is scored up to its end.
    """
    answers = answer_questions(
        model, tokenizer, questions=questions, max_new_tokens=max_new_tokens, progress=progress, processes=processes
    )
    likelihoods, rows = answers.likelihoods, len(questions)
    scores, score = likelihoods.scores, likelihoods.score
    if not max_new_tokens:
        return Outcome(scores, rows, [], answers.facts, likelihoods.values, resample(rows, score))
    examples = [
        {"row": row + 1, "prompt": answers.prompts[row], "wanted": answers.expected[row], "found": answers.generated[row]}
        for row in range(min(SAMPLES, rows))
    ]
    similarity = ChrfBleu(answers.generated, answers.expected)
    form = Form.of(answers, tokenizer, most=max_new_tokens)
    replicates = resample(rows, lambda draws: score(draws) | similarity.score(draws) | form.score(draws))
    values = likelihoods.values | {"chrf": round_all(similarity.sentence_chrf)}
    facts = answers.facts | {"expected_repetition": round(float(form.expected_repetition.mean()), 4)}
    if warnings := form.warnings(answers.generated):
        facts["warnings"] = warnings
    found = scores | similarity.scores | rounded(form.score(np.ones(rows)))
    return Outcome(found, rows, examples, facts, values, replicates)


@dataclass(frozen=True)
class Form:
    """How long and how repetitive answers are, beside the expected ones; an entry for each."""

    tokens: npt.NDArray[np.float64]
    expected_tokens: npt.NDArray[np.float64]  # at most as many as an answer may have
    repetition: npt.NDArray[np.float64]
    expected_repetition: npt.NDArray[np.float64]

    @classmethod
    def of(cls, answers: "Answers", tokenizer: TextTokenizer, *, most: int) -> "Form":
        """The form of answers of at most `most` tokens."""
        generated, expected = tokenizer.encode_batch(answers.generated), tokenizer.encode_batch(answers.expected)
        return cls(
            np.array([len(ids) for ids in generated], dtype=np.float64),
            np.array([min(most, len(ids)) for ids in expected], dtype=np.float64),
            np.array([repetition(ids) for ids in generated]),
            np.array([repetition(ids[:most]) for ids in expected]),
        )

    def score(self, draws: Resamples) -> dict[str, float]:
        """Both; each answer counts as often as it was drawn."""
        length = float(draws @ self.tokens) / max(1.0, float(draws @ self.expected_tokens))
        return {"length_ratio": length, "repetition": float(draws @ self.repetition) / float(draws.sum())}

    def warnings(self, generated: Sequence[str]) -> list[str]:
        """Sentences on what looks wrong with the answers."""
        found, all_of_them = self.score(np.ones(len(generated))), len(generated)
        told = []
        if found["length_ratio"] < SHORT:
            told.append(f"answers have {found['length_ratio']:.0%} of the length of the expected ones")
        if (more := found["repetition"] - float(self.expected_repetition.mean())) > REPEATED:
            told.append(
                f"answers repeat {found['repetition']:.0%} of their runs of {GRAM} tokens, {more:.0%} more than expected"
            )
        (text, count), *_ = Counter(generated).most_common(1)
        if all_of_them > 2 and count > SAME * all_of_them:
            told.append(f"{count} of {all_of_them} answers are the same: {text[:60]!r}")
        return told


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Answers:
    """A model's answers to questions, and its likelihoods of the expected ones; an entry for each question."""

    likelihoods: Likelihoods
    prompts: list[str]  # whole
    expected: list[str]
    generated: list[str]  # empty if nothing was generated
    facts: dict[str, Any]


def answer_questions(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Answers:
    """The likelihoods of the expected answers after their prompts, as far as they fit the context, and greedy answers of at
    most `max_new_tokens` tokens, or none if it is 0.
    """
    context = model.context
    streams = [fit_question(question, tokenizer, context, cut_response=True) for question in questions]
    starts = [stream.answer_start for stream in streams]
    windows = [answer_window(stream) for stream in streams]
    expected = [question.expected for question in questions]
    scored = [
        tokenizer.decode(stream.ids[start:]) if stream.cut_response else text
        for stream, start, text in zip(streams, starts, expected, strict=True)
    ]
    timer = GenerationTimer()
    likelihoods = Likelihoods(
        nats=negative_log_likelihoods(model, windows, timer=timer, processes=processes, progress=progress),
        tokens=[len(stream.ids) - start for stream, start in zip(streams, starts, strict=True)],
        text_bytes=[len(text.encode()) for text in scored],
    )
    facts: dict[str, Any] = {
        "cut_prompts": sum(stream.cut_prompt for stream in streams),
        "cut_answers": sum(stream.cut_response for stream in streams),
    }
    generated: list[str] = []
    if max_new_tokens:
        prompts = [prompt_tokens(question, tokenizer, context - max_new_tokens) for question in questions]
        written = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            end=tokenizer.ends,
            timer=timer,
            processes=processes,
            progress=lambda done: progress(done, len(questions)),
        )
        generated = [tokenizer.decode(ids) for ids in written]
        facts["unended"] = sum(len(ids) == max_new_tokens for ids in written)
    # Whole prompts: a prompt may have been cut to score a long answer, but the model's own answer follows a longer part of it.
    asked = ["\n".join(turn.content for turn in question.turns[:-1]) for question in questions]
    return Answers(likelihoods, asked, expected, generated, facts | speeds(timer))


def answer_window(stream: Stream) -> Window:
    """The chat as a window in which only the last answer is scored."""
    start = stream.answer_start
    return Window(stream.ids[:-1], [IGNORE] * (start - 1) + stream.ids[start:])


def speeds(timer: GenerationTimer) -> dict[str, Any]:
    """Tokens and tokens per second, for the facts of an outcome."""
    speed = round(timer.prompt_tokens / timer.prompt_seconds)
    found = {"prompt_tokens": timer.prompt_tokens, "prompt_tokens_per_second": speed}
    if timer.new_tokens:
        found |= {"new_tokens": timer.new_tokens, "new_tokens_per_second": round(timer.new_tokens / timer.new_seconds)}
    return found


def fit_question(question: Question, tokenizer: TextTokenizer, context: int, *, cut_response: bool = False) -> Stream:
    """The chat cut to the context; InputError if the answer does not fit and may not be cut."""
    try:
        stream = fit(question.turns, tokenizer, positions=context)
    except InputError as error:
        raise InputError(f"{question.place}: {error}") from error
    if not any(stream.loss_mask[1:]) or (stream.cut_response and not cut_response):
        raise InputError(
            f"{question.place}: expected the answer and the fixed text of the prompt to fit the model's "
            f"context of {context:,} "
            f"tokens, got {stream.full_length:,} tokens; shorten the template or leave out the row"
        )
    return stream


def prompt_tokens(question: Question, tokenizer: TextTokenizer, room: int) -> list[int]:
    """The chat up to the answer, as at most `room` tokens."""
    if room < 1:
        raise InputError(
            f"max_new_tokens: expected less than the model's context, but it leaves {room:,} tokens for the prompt"
        )
    stream = fit_question(question.with_answer(""), tokenizer, room)
    return stream.ids[: stream.answer_start]
