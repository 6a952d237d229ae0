"""What a model is worth on held-out data: likelihood of text, classification by the likelihood of labels, and answers.

Every function returns an `Outcome`: scores that depend on model and data alone (rounded, so that the order in which cores
add numbers does not show), and facts such as speeds, which depend on the machine and are for the record only. Gates and
files are not known here, nor how likelihoods are computed: `llm.inference.likelihood`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llm.data.batch import IGNORE
from llm.data.conversations import Turn
from llm.data.truncation import Stream, fit
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, macro_f1, resample, round_all, rounded
from llm.evaluation.chrf_bleu import Likeness
from llm.inference.generate import GenerationTimer, generate
from llm.inference.likelihood import OnProgress, Window, label_likelihoods, negative_log_likelihoods, similar_lengths
from llm.models.interface import LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

SAMPLES = 20  # answers that are shown


@dataclass(frozen=True)
class Question:
    """A chat whose last turn is the answer that is wanted; `place` is where it stands, as file:line."""

    place: str
    turns: Sequence[Turn]


@dataclass(frozen=True)
class Outcome:
    """The result of one task."""

    scores: dict[str, float]
    rows: int
    examples: list[dict[str, Any]] = field(default_factory=list)  # what went wrong, or samples
    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)  # by name, a number for each row
    replicates: dict[str, list[float]] = field(default_factory=dict)  # by score, its value in every resample of the rows


@dataclass(frozen=True)
class Likelihoods:
    """Of texts or answers: in nats, over how many tokens, and how long they are in bytes; one entry for each."""

    nats: list[float]
    tokens: list[int]
    text_bytes: list[int]

    @property
    def score(self) -> Callable[[Resamples], dict[str, float]]:
        """`perplexity` per token and `bits_per_byte` as a function of how often each entry counts."""
        columns = np.array([self.nats, self.tokens, self.text_bytes], dtype=np.float64)

        def score(draws: Resamples) -> dict[str, float]:
            nats, tokens, text_bytes = (columns @ draws).tolist()
            return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes}

        return score

    @property
    def scores(self) -> dict[str, float]:
        """The scores of all together; InputError if the model gives no finite numbers."""
        if not math.isfinite(sum(self.nats)):
            raise InputError(
                "the model's likelihoods are not finite numbers; its weights are damaged, or its training diverged"
            )
        return rounded(self.score(np.ones(len(self.nats))))

    @property
    def values(self) -> dict[str, list[Any]]:
        """The entries, for the artifact."""
        return {"nats": round_all(self.nats), "tokens": self.tokens, "bytes": self.text_bytes}


def score_texts(model: LanguageModel, tokenizer: TextTokenizer, *, texts: Sequence[str], progress: OnProgress) -> Outcome:
    """`perplexity` per token and `bits_per_byte` of whole documents, the end token of each included.

    A document longer than the model's context is cut into windows that do not overlap; each token is scored once, in view of
    what its window holds before it.
    """
    context = model.context
    documents = [
        [
            Window(ids[start : start + context], ids[start + 1 : start + context + 1])
            for start in range(0, len(ids) - 1, context)
        ]
        for ids in tokenizer.encode_documents(texts)
    ]
    timer = GenerationTimer()
    windows = [window for document in documents for window in document]
    nats = iter(negative_log_likelihoods(model, windows, timer=timer, progress=progress))
    found = Likelihoods(
        nats=[sum(next(nats) for _ in document) for document in documents],
        tokens=[sum(len(window.targets) for window in document) for document in documents],
        text_bytes=[len(text.encode()) for text in texts],
    )
    return Outcome(
        found.scores,
        len(texts),
        facts=_speeds(timer),
        values=found.values,
        replicates=resample(len(texts), found.score),
    )


def classify(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[Question],
    labels: Sequence[str] | None = None,
    progress: OnProgress,
) -> Outcome:
    """`accuracy` and `macro_f1` where the model's label is the likeliest: the largest sum of the log-probabilities of the
    label's tokens, end token included, after the chat up to there. Without `labels`, those that occur are the choice.

    The prompt is computed once for all labels. A prompt that does not fit the model beside the longest label is cut as in
    training. Raises InputError for a label that is not among `labels`, and where there is nothing to choose from.
    """
    wanted = [question.turns[-1].content for question in questions]
    names = sorted(set(wanted)) if labels is None else list(labels)
    for question, label in zip(questions, wanted, strict=True):
        if label not in names:
            raise InputError(f"{question.place}: expected one of the labels {', '.join(map(repr, names))}, got {label!r}")
    if len(set(names)) < 2:
        raise InputError(
            f"{questions[0].place}: expected rows of at least two distinct labels to choose from, got {names[0]!r} alone in "
            f"{len(questions):,} rows"
        )
    spelled = [_label_tokens(tokenizer, name) for name in names]
    longest = max(range(len(names)), key=lambda index: len(spelled[index]))
    streams = [
        _fit(replace(question, turns=[*question.turns[:-1], Turn("assistant", (names[longest],))]), tokenizer, model.context)
        for question in questions
    ]
    prompts = [stream.ids[: -len(spelled[longest])] for stream in streams]
    timer = GenerationTimer()
    chosen: list[int] = [0] * len(prompts)
    margins: list[float] = [0.0] * len(prompts)
    done = 0
    decoding = model.decoding()
    for batch in similar_lengths([len(prompt) + len(spelled[longest]) for prompt in prompts]):
        likelihoods = label_likelihoods(decoding, [prompts[index] for index in batch], spelled, timer=timer)  # (B, L)
        for index, row in zip(batch, likelihoods, strict=True):
            chosen[index] = int(row.argmax())
            margins[index] = float(row.max() - row[names.index(wanted[index])])
        progress(done := done + len(batch), len(prompts))
    found = [names[index] for index in chosen]
    wrong = [
        {
            "row": row + 1,
            "prompt": _prompt_text(streams[row]),
            "wanted": wanted[row],
            "found": found[row],
            "nats_behind": round(margins[row], 3),
        }
        for row in range(len(prompts))
        if wanted[row] != found[row]
    ]
    facts = {"labels": names, "cut_prompts": sum(stream.cut_prompt for stream in streams), **_speeds(timer)}
    number = {name: index for index, name in enumerate(names)}
    of_wanted = np.array([number[name] for name in wanted])
    of_found = np.array([number[name] for name in found])
    f1 = macro_f1(of_wanted, of_found, len(names))
    hits = (of_wanted == of_found).astype(np.float64)

    def score(draws: Resamples) -> dict[str, float]:
        return {"accuracy": float(draws @ hits) / len(hits), "macro_f1": f1(draws)}

    return Outcome(
        rounded(score(np.ones(len(hits)))),
        len(prompts),
        wrong,
        facts,
        values={"wanted": of_wanted.tolist(), "found": of_found.tolist()},
        replicates=resample(len(prompts), score),
    )


def score_answers(
    model: LanguageModel, tokenizer: TextTokenizer, *, questions: Sequence[Question], max_new_tokens: int, progress: OnProgress
) -> Outcome:
    """`perplexity` and `bits_per_byte` of the wanted answers after their prompts, and `chrf` and `bleu` of the model's own
    greedy answers against them, 0 to 100. Without `max_new_tokens`, nothing is generated.

    An answer that does not fit the model is scored as far as it does.
    """
    answered = answer(model, tokenizer, questions=questions, max_new_tokens=max_new_tokens, progress=progress)
    likelihoods, rows = answered.likelihoods, len(questions)
    scores, of_draws = likelihoods.scores, likelihoods.score
    if not max_new_tokens:
        resampled = resample(rows, of_draws)
        return Outcome(scores, rows, [], answered.facts, likelihoods.values, resampled)
    examples = [
        {"row": row + 1, "prompt": answered.prompts[row], "wanted": answered.wanted[row], "found": answered.found[row]}
        for row in range(min(SAMPLES, rows))
    ]
    likeness = Likeness(answered.found, answered.wanted)
    resampled = resample(rows, lambda draws: of_draws(draws) | likeness.score(draws))
    values = likelihoods.values | {"chrf": round_all(likeness.sentence_chrf)}
    return Outcome(scores | likeness.scores, rows, examples, answered.facts, values, resampled)


@dataclass(frozen=True)
class Answered:
    """What a model makes of questions, an entry for each: how likely it finds the wanted answer, and its own greedy one."""

    likelihoods: Likelihoods
    prompts: list[str]  # whole
    wanted: list[str]
    found: list[str]  # empty where nothing was generated
    facts: dict[str, Any]


def answer(
    model: LanguageModel, tokenizer: TextTokenizer, *, questions: Sequence[Question], max_new_tokens: int, progress: OnProgress
) -> Answered:
    """The likelihood of the wanted answers after their prompts, as far as they fit the model; and its own, if at most
    `max_new_tokens` are asked for.
    """
    context = model.context
    streams = [_fit(question, tokenizer, context, cut_response=True) for question in questions]
    starts = [stream.answer_start for stream in streams]
    windows = [
        Window(stream.ids[:-1], [IGNORE] * (start - 1) + stream.ids[start:])
        for stream, start in zip(streams, starts, strict=True)
    ]
    wanted = [question.turns[-1].content for question in questions]
    scored = [
        tokenizer.decode(stream.ids[start:]) if stream.cut_response else text
        for stream, start, text in zip(streams, starts, wanted, strict=True)
    ]
    total = len(questions) * (2 if max_new_tokens else 1)
    timer = GenerationTimer()
    likelihoods = Likelihoods(
        nats=negative_log_likelihoods(model, windows, timer=timer, progress=lambda done, _: progress(done, total)),
        tokens=[len(stream.ids) - start for stream, start in zip(streams, starts, strict=True)],
        text_bytes=[len(text.encode()) for text in scored],
    )
    facts: dict[str, Any] = {
        "cut_prompts": sum(stream.cut_prompt for stream in streams),
        "cut_answers": sum(stream.cut_response for stream in streams),
    }
    found: list[str] = []
    if max_new_tokens:
        prompts = [_prompt(question, tokenizer, context - max_new_tokens) for question in questions]
        written = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            end=tokenizer.ends,
            timer=timer,
            progress=lambda done: progress(len(questions) + done, total),
        )
        found = [tokenizer.decode(ids) for ids in written]
        facts["unended"] = sum(len(ids) == max_new_tokens for ids in written)
    # The whole question: to score a long answer it may have been cut, but what the model writes follows all of it that fits.
    asked = ["\n".join(turn.content for turn in question.turns[:-1]) for question in questions]
    return Answered(likelihoods, asked, wanted, found, facts | _speeds(timer))


def _fit(question: Question, tokenizer: TextTokenizer, context: int, *, cut_response: bool = False) -> Stream:
    """The chat within the model's context; an InputError names the row if the answer does not fit and may not be cut."""
    try:
        stream = fit(question.turns, tokenizer, positions=context)
    except InputError as error:
        raise InputError(f"{question.place}: {error}") from error
    if not any(stream.loss_mask[1:]) or (stream.cut_response and not cut_response):
        raise InputError(
            f"{question.place}: the answer does not fit: it ends at token {stream.full_length:,} with what the prompt always "
            f"says, and the model's context is {context:,}"
        )
    return stream


def _prompt(question: Question, tokenizer: TextTokenizer, room: int) -> list[int]:
    """What is said before the answer, as at most `room` tokens."""
    if room < 1:
        raise InputError(f"max_new_tokens: expected less than the model's context; it leaves {room:,} tokens for the prompt")
    stream = _fit(replace(question, turns=[*question.turns[:-1], Turn("assistant", ("",))]), tokenizer, room)
    return stream.ids[: stream.answer_start]


def _label_tokens(tokenizer: TextTokenizer, label: str) -> list[int]:
    """The tokens of a label as an answer, with the end token."""
    ids, loss_mask = tokenizer.encode_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": label}])
    return [token for token, counts in zip(ids, loss_mask, strict=True) if counts]


def _prompt_text(stream: Stream) -> str:
    return "\n".join(message["content"] for message in stream.messages[:-1])


def _speeds(timer: GenerationTimer) -> dict[str, Any]:
    speeds = {
        "prompt_tokens": timer.prompt_tokens,
        "prompt_tokens_per_second": round(timer.prompt_tokens / timer.prompt_seconds),
    }
    if timer.new_tokens:
        speeds |= {"new_tokens": timer.new_tokens, "new_tokens_per_second": round(timer.new_tokens / timer.new_seconds)}
    return speeds
