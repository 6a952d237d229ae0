"""What a model is worth on held-out data: likelihood of text, classification by the likelihood of labels, and answers.

Every function returns an `Outcome`: scores that depend on model and data alone (rounded, so that the order in which cores
add numbers does not show), and facts such as speeds, which depend on the machine and are for the record only. Gates and
files are not known here, nor how likelihoods are computed: `llm.likelihood`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.chat import Stream, fit
from llm.documents import language_by_script
from llm.errors import InputError
from llm.generate import Clock, generate
from llm.likelihood import Progress, Window, label_likelihoods, negative_log_likelihoods, similar_lengths
from llm.models.llama.model import Llama
from llm.rows import IGNORE
from llm.tokenizer import TextTokenizer
from llm.turns import Turn

DIGITS = 6  # of a score; in which order cores add numbers shows from the 9th on
SAMPLES = 20  # answers that are shown
BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "thai": "char"}  # languages that write no spaces; "13a" for all others


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


def score_texts(model: Llama, tokenizer: TextTokenizer, *, texts: Sequence[str], progress: Progress) -> Outcome:
    """`perplexity` per token and `bits_per_byte` of whole documents, the end token of each included.

    A document longer than the model's context is cut into windows that do not overlap; each token is scored once, in view of
    what its window holds before it.
    """
    context = _context(model)
    windows = [
        Window(ids[start : start + context], ids[start + 1 : start + context + 1])
        for ids in tokenizer.encode_documents(texts)
        for start in range(0, len(ids) - 1, context)
    ]
    clock = Clock()
    nats = sum(negative_log_likelihoods(model, windows, clock=clock, progress=progress))
    scores = _likelihood_scores(
        nats, tokens=sum(len(window.targets) for window in windows), text_bytes=sum(len(text.encode()) for text in texts)
    )
    return Outcome(scores, len(texts), facts=_speeds(clock))


def classify(
    model: Llama,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[Question],
    labels: Sequence[str] | None = None,
    progress: Progress,
) -> Outcome:
    """`accuracy` and `macro_f1` where the model's label is the likeliest: the largest sum of the log-probabilities of the
    label's tokens, end token included, after the chat up to there. Without `labels`, those that occur are the choice.

    The prompt is computed once for all labels. A prompt that does not fit the model beside the longest label is cut as in
    training. Raises InputError for a label that is not among `labels`, and where there is nothing to choose from.
    """
    from sklearn.metrics import accuracy_score, f1_score

    wanted = [question.turns[-1].content for question in questions]
    names = sorted(set(wanted)) if labels is None else list(labels)
    for question, label in zip(questions, wanted, strict=True):
        if label not in names:
            raise InputError(f"{question.place}: wants one of the labels {', '.join(map(repr, names))}; found {label!r}")
    if len(set(names)) < 2:
        raise InputError(
            f"{questions[0].place}: wants rows of at least two distinct labels to choose from; found {names[0]!r} alone in "
            f"{len(questions):,} rows"
        )
    spelled = [_learned(tokenizer, name) for name in names]
    longest = max(range(len(names)), key=lambda index: len(spelled[index]))
    streams = [
        _fit(replace(question, turns=[*question.turns[:-1], Turn("assistant", (names[longest],))]), tokenizer, _context(model))
        for question in questions
    ]
    prompts = [stream.ids[: -len(spelled[longest])] for stream in streams]
    clock = Clock()
    chosen: list[int] = [0] * len(prompts)
    margins: list[float] = [0.0] * len(prompts)
    done = 0
    decoding = model.decoding()
    for batch in similar_lengths([len(prompt) + len(spelled[longest]) for prompt in prompts]):
        likelihoods = label_likelihoods(decoding, [prompts[index] for index in batch], spelled, clock=clock)  # (B, L)
        for index, row in zip(batch, likelihoods, strict=True):
            chosen[index] = int(row.argmax())
            margins[index] = float(row.max() - row[names.index(wanted[index])])
        progress(done := done + len(batch), len(prompts))
    found = [names[index] for index in chosen]
    scores = {
        "accuracy": float(accuracy_score(wanted, found)),
        "macro_f1": float(f1_score(wanted, found, labels=names, average="macro", zero_division=0)),
    }
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
    facts = {"labels": names, "cut_prompts": sum(stream.cut_prompt for stream in streams), **_speeds(clock)}
    return Outcome(_rounded(scores), len(prompts), wrong, facts)


def score_answers(
    model: Llama, tokenizer: TextTokenizer, *, questions: Sequence[Question], max_new_tokens: int, progress: Progress
) -> Outcome:
    """`perplexity` and `bits_per_byte` of the wanted answers after their prompts, and `chrf` and `bleu` of the model's own
    greedy answers against them, 0 to 100. Without `max_new_tokens`, nothing is generated.

    An answer that does not fit the model is scored as far as it does.
    """
    context = _context(model)
    streams = [_fit(question, tokenizer, context, cut_response=True) for question in questions]
    starts = [len(stream.ids) - len(_last_run(stream.learned)) for stream in streams]
    windows = [
        Window(stream.ids[:-1], [IGNORE] * (start - 1) + stream.ids[start:])
        for stream, start in zip(streams, starts, strict=True)
    ]
    wanted = [question.turns[-1].content for question in questions]
    scored = [
        tokenizer.decode(stream.ids[start:]) if stream.cut_response else answer
        for stream, start, answer in zip(streams, starts, wanted, strict=True)
    ]
    total = len(questions) * (2 if max_new_tokens else 1)
    clock = Clock()
    nats = sum(negative_log_likelihoods(model, windows, clock=clock, progress=lambda done, _: progress(done, total)))
    scores = _likelihood_scores(
        nats,
        tokens=sum(len(stream.ids) - start for stream, start in zip(streams, starts, strict=True)),
        text_bytes=sum(len(text.encode()) for text in scored),
    )
    facts: dict[str, Any] = {
        "cut_prompts": sum(stream.cut_prompt for stream in streams),
        "cut_answers": sum(stream.cut_response for stream in streams),
    }
    if not max_new_tokens:
        return Outcome(scores, len(questions), facts=facts | _speeds(clock))
    prompts = [_prompt(question, tokenizer, context - max_new_tokens) for question in questions]
    answers = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        end=tokenizer.ends,
        clock=clock,
        progress=lambda done: progress(len(questions) + done, total),
    )
    found = [tokenizer.decode(answer) for answer in answers]
    examples = [
        {"row": row + 1, "prompt": _prompt_text(streams[row]), "wanted": wanted[row], "found": found[row]}
        for row in range(min(SAMPLES, len(found)))
    ]
    facts["unended"] = sum(len(answer) == max_new_tokens for answer in answers)
    return Outcome(scores | compare(found, wanted), len(questions), examples, facts | _speeds(clock))


def compare(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """`chrf` (Popović 2015) and `bleu` (Papineni et al. 2002) of the whole set, by sacrebleu (Post 2018)."""
    import sacrebleu

    ((language, _),) = Counter(map(language_by_script, wanted)).most_common(1)
    tokenizer = BLEU_TOKENIZERS.get(language, "13a")
    bleu = sacrebleu.corpus_bleu(found, [wanted], tokenize=tokenizer, force=True)  # force: no warning for tokenized text
    return _rounded({"chrf": sacrebleu.corpus_chrf(found, [wanted]).score, "bleu": bleu.score})


def _fit(question: Question, tokenizer: TextTokenizer, context: int, *, cut_response: bool = False) -> Stream:
    """The chat within the model's context; an InputError names the row if the answer does not fit and may not be cut."""
    try:
        stream = fit(question.turns, tokenizer, positions=context)
    except InputError as error:
        raise InputError(f"{question.place}: {error}") from error
    if not any(stream.learned[1:]) or (stream.cut_response and not cut_response):
        raise InputError(
            f"{question.place}: the answer does not fit: it ends at token {stream.full_length:,} with what the prompt always "
            f"says, and the model's context is {context:,}"
        )
    return stream


def _prompt(question: Question, tokenizer: TextTokenizer, room: int) -> list[int]:
    """What is said before the answer, as at most `room` tokens."""
    if room < 1:
        raise InputError(f"max_new_tokens wants less than the model's context; it leaves {room:,} tokens for the prompt")
    stream = _fit(replace(question, turns=[*question.turns[:-1], Turn("assistant", ("",))]), tokenizer, room)
    return stream.ids[: len(stream.ids) - len(_last_run(stream.learned))]


def _last_run(learned: Sequence[bool]) -> list[bool]:
    """The flags of the last turn of the assistant, with which every stream ends."""
    size = 0
    while size < len(learned) and learned[-1 - size]:
        size += 1
    return list(learned[len(learned) - size :])


def _learned(tokenizer: TextTokenizer, label: str) -> list[int]:
    """The tokens of a label as an answer, with the end token."""
    ids, learned = tokenizer.encode_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": label}])
    return [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]


def _prompt_text(stream: Stream) -> str:
    return "\n".join(message["content"] for message in stream.messages[:-1])


def _likelihood_scores(nats: float, *, tokens: int, text_bytes: int) -> dict[str, float]:
    if not math.isfinite(nats):
        raise InputError("the model's likelihoods are not finite numbers; its weights are damaged, or its training diverged")
    return _rounded({"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes})


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in scores.items()}


def _speeds(clock: Clock) -> dict[str, Any]:
    speeds = {
        "prompt_tokens": clock.prompt_tokens,
        "prompt_tokens_per_second": round(clock.prompt_tokens / clock.prompt_seconds),
    }
    if clock.new_tokens:
        speeds |= {"new_tokens": clock.new_tokens, "new_tokens_per_second": round(clock.new_tokens / clock.new_seconds)}
    return speeds


def _context(model: Llama) -> int:
    context = model.config.context
    assert context is not None  # every checkpoint says it
    return context
