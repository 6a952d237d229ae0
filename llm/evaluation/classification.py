"""Classification by the likelihood of labels: which label is likeliest, how often that is right, and how sure it is.

Letters: N rows, L labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.data.conversations import NONE
from llm.data.truncation import Long, Stream, windows
from llm.errors import InputError
from llm.evaluation.bootstrap import Resamples, macro_f1, resample, round_all, rounded
from llm.evaluation.by_class import by_class
from llm.evaluation.calibration import Floats, calibration_of, probabilities
from llm.evaluation.multi_label import judged_label_sets
from llm.evaluation.scoring import Outcome, Question, fit_question, speeds
from llm.inference.batches import OnProgress
from llm.inference.likelihood import Choice, continuation_likelihoods
from llm.inference.processes import ALONE, Processes
from llm.inference.timer import GenerationTimer
from llm.models.interface import Decoding, LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

MOST_CONFUSED = 20  # labels of which the whole confusion matrix is kept


def classify(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    *,
    questions: Sequence[Question],
    labels: Sequence[str] | None = None,
    long: Long = "cut",
    several: bool = False,
    threshold: float | None = None,
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Outcome:
    """`accuracy`, `macro_f1` and `ece` of the likeliest label: the largest sum of the log-probabilities of the label's tokens,
    end token included, after the prompt. By default the labels are those that occur.

    The prompt is computed once for all labels. A prompt that does not fit the context with the longest label is cut as in
    training; or read in windows, whose log-probabilities are averaged; or fails. InputError for a
    label that is not in `labels`, or if there are fewer than two labels. With `several` labels of a row the scores are those
    of `llm.evaluation.multi_label`.
    """
    names = label_names(questions, labels)
    timer = GenerationTimer()
    likelihoods, streams, rows = label_likelihoods(
        model, tokenizer, questions, names, long=long, timer=timer, progress=progress, processes=processes
    )
    facts = {"cut_prompts": sum(stream.cut_prompt for stream in streams), **speeds(timer)}
    first = np.searchsorted(rows, np.arange(len(questions)))  # windows
    shown = ["\n".join(message["content"] for message in streams[at].messages[:-1]) for at in first]
    if several:
        return judged_label_sets(names, questions, probabilities(likelihoods), prompts=shown, facts=facts, threshold=threshold)
    return judged_labels(names, questions, likelihoods, prompts=shown, facts=facts)


def label_likelihoods(
    model: LanguageModel | Decoding,
    tokenizer: TextTokenizer,
    questions: Sequence[Question],
    labels: Sequence[str],
    *,
    long: Long,
    progress: OnProgress,
    timer: GenerationTimer | None = None,
    processes: Processes = ALONE,
) -> tuple[npt.NDArray[np.float64], list[Stream], npt.NDArray[np.int64]]:
    """log P of each label after each question, (N, L); and its windows, with the longest label, and the question of each."""
    spelled = [_label_tokens(tokenizer, label) for label in labels]
    longest = max(range(len(labels)), key=lambda index: len(spelled[index]))
    asked = [question.with_answer(labels[longest]) for question in questions]
    pieces = [_pieces(question, tokenizer, model.context, long) for question in asked]
    rows = np.repeat(np.arange(len(pieces)), [len(of_row) for of_row in pieces])  # (windows,)
    streams = [fit_question(piece, tokenizer, model.context) for of_row in pieces for piece in of_row]
    choices = [Choice(stream.ids[: -len(spelled[longest])], spelled) for stream in streams]
    found = continuation_likelihoods(model, choices, timer=timer, processes=processes, progress=progress)
    likelihoods = np.zeros((len(questions), len(labels)))
    np.add.at(likelihoods, rows, np.array(found))
    return likelihoods / np.bincount(rows)[:, None], streams, rows


def _pieces(question: Question, tokenizer: TextTokenizer, context: int, long: Long) -> list[Question]:
    """The question, or its windows; InputError for one that is too long if it is to fail."""
    if long == "window":
        return [replace(question, turns=turns) for turns in windows(question.turns, tokenizer, positions=context)]
    if long == "fail" and (length := len(tokenizer.encode_chat([turn.message for turn in question.turns])[0]) - 1) > context:
        raise InputError(f'{question.place}: expected at most {context:,} positions, as long = "fail" asks, got {length:,}')
    return [question]


def judged_labels(
    names: Sequence[str], questions: Sequence[Question], likelihoods: Floats, *, prompts: Sequence[str], facts: dict[str, Any]
) -> Outcome:
    """The outcome of choosing the likeliest of `names` for each question, from log P of each (N, L), finite.

    Examples are the wrong rows, the surest first. Facts have precision, recall, F1 and support of each label, and of few
    labels the confusion matrix.
    """
    number = {name: index for index, name in enumerate(names)}
    expected, chosen = np.array([number[question.expected] for question in questions]), likelihoods.argmax(1)
    every = np.arange(len(expected))
    sure = probabilities(likelihoods)[every, chosen]
    behind = likelihoods[every, chosen] - likelihoods[every, expected]
    wrong = [
        {
            "row": int(row) + 1,
            "prompt": prompts[row],
            "wanted": names[expected[row]],
            "found": names[chosen[row]],
            "probability": float(f"{sure[row]:.4g}"),
            "nats_behind": round(float(behind[row]), 3),
        }
        for row in np.argsort(-sure, kind="stable")
        if expected[row] != chosen[row]
    ]
    f1, calibration = macro_f1(expected, chosen, len(names)), calibration_of(sure, expected == chosen)
    hits = (expected == chosen).astype(np.float64)

    def score(draws: Resamples) -> dict[str, float]:
        return {"accuracy": float(draws @ hits) / len(hits), "macro_f1": f1(draws), "ece": calibration(draws)}

    values = {"wanted": expected.tolist(), "found": chosen.tolist(), "probability": round_all(sure.tolist())}
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (expected, chosen), 1)
    right = confusion.diagonal()
    facts = {"labels": list(names), "classes": by_class(names, right, confusion.sum(1), confusion.sum(0)), **facts}
    if len(names) <= MOST_CONFUSED:
        facts["confusion"] = confusion.tolist()  # rows: expected; columns: chosen
    return Outcome(rounded(score(np.ones(len(hits)))), len(hits), wrong, facts, values, resample(len(hits), score))


def label_names(questions: Sequence[Question], labels: Sequence[str] | None) -> list[str]:
    """The labels to choose from, after a check of the rows."""
    expected = [(question.place, label) for question in questions for label in question.labels or (question.expected,)]
    names = sorted({label for _, label in expected}) if labels is None else list(labels)
    if labels is not None and NONE in (label for _, label in expected) and NONE not in names:
        names.append(NONE)
    for place, label in expected:
        if label not in names:
            raise InputError(f"{place}: expected one of the labels {', '.join(map(repr, names))}, got {label!r}")
    if len(set(names)) < 2:
        raise InputError(
            f"{questions[0].place}: expected rows of at least two distinct labels to choose from, got {names[0]!r} alone in "
            f"{len(questions):,} rows"
        )
    return names


def _label_tokens(tokenizer: TextTokenizer, label: str) -> list[int]:
    """The tokens of a label as an answer, with the end token."""
    ids, loss_mask = tokenizer.encode_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": label}])
    return [token for token, counts in zip(ids, loss_mask, strict=True) if counts]
