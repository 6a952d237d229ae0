"""Rows with several labels, or none: which are chosen, and `micro_f1`, `macro_f1` and `subset_accuracy` of the choice.

A model learns each label of a row by itself (the targets of Mahajan et al. 2018, https://arxiv.org/abs/1805.00932: k labels
have 1/k each), so the labels that a row has are about equally likely: chosen is every label whose probability is at least a
threshold times that of the likeliest.

Letters: N rows, L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.data.conversations import NONE
from llm.evaluation.bootstrap import Resamples, resample, rounded
from llm.evaluation.by_class import by_class
from llm.evaluation.calibration import Floats
from llm.evaluation.scoring import Outcome, Question

Chosen = npt.NDArray[np.bool_]  # (N, L)
THRESHOLDS = np.arange(1, 100) / 100


def chosen_labels(shares: Floats, threshold: float, names: Sequence[str]) -> Chosen:
    """Which labels are chosen, (N, L), from their probabilities: at least the likeliest; if that is NONE, no other one."""
    chosen: Chosen = shares >= threshold * shares.max(1, keepdims=True)
    if NONE in names:
        none = names.index(NONE)
        alone = shares.argmax(1) == none
        chosen[alone] = False
        chosen[:, none] = alone
    return chosen


def best_threshold(shares: Floats, expected: Chosen, names: Sequence[str]) -> float:
    """The threshold with the highest micro-F1: the middle one, if several are equally good."""
    counted = _without_none(names)
    found = [_micro_f1(expected[:, counted], chosen_labels(shares, one, names)[:, counted]) for one in THRESHOLDS]
    best = np.flatnonzero(np.isclose(found, max(found)))
    return float(THRESHOLDS[best[len(best) // 2]])


def judged_label_sets(
    names: Sequence[str],
    questions: Sequence[Question],
    shares: Floats,
    *,
    prompts: Sequence[str],
    facts: dict[str, Any],
    threshold: float | None = None,
) -> Outcome:
    """The outcome of choosing labels by their probabilities (N, L). Without a `threshold`, that of each half of the rows is
    chosen on the other half; facts have the one of all rows.
    """
    expected = np.array([[name in question.labels for name in names] for question in questions])
    used = threshold or best_threshold(shares, expected, names)
    chosen = np.zeros_like(expected)
    for half in (0, 1):
        other = slice(1 - half, None, 2)
        own = threshold or (best_threshold(shares[other], expected[other], names) if len(shares) > 1 else used)
        chosen[half::2] = chosen_labels(shares[half::2], own, names)
    counted = _without_none(names)
    wanted, found = expected[:, counted], chosen[:, counted]

    def score(draws: Resamples) -> dict[str, float]:
        f1 = _f1(*(draws @ one for one in (wanted & found, wanted, found)))
        return {
            "micro_f1": _micro_f1(wanted, found, draws),
            "macro_f1": float(f1.mean()),
            "subset_accuracy": float(draws @ (wanted == found).all(1)) / len(draws),
        }

    labels = [names[place] for place in counted]
    counts = (one.sum(0) for one in (wanted & found, wanted, found))
    facts = {"labels": list(names), "threshold": used, "classes": by_class(labels, *counts), **facts}
    values = {name: [np.flatnonzero(row).tolist() for row in one] for name, one in (("wanted", wanted), ("found", found))}
    wrong = _wrong(labels, wanted, found, shares[:, counted], prompts)
    return Outcome(rounded(score(np.ones(len(shares)))), len(shares), wrong, facts, values, resample(len(shares), score))


def _wrong(
    labels: Sequence[str], wanted: Chosen, found: Chosen, shares: Floats, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows with a wrong choice, those with the likeliest label that is not expected first."""
    sure = np.where(wanted, 0, shares).max(1)
    rows = [int(row) for row in np.argsort(-sure, kind="stable") if (wanted[row] != found[row]).any()]
    told = [[", ".join(np.array(labels)[row]) or NONE for row in one] for one in (wanted, found)]
    return [
        {"row": row + 1, "prompt": prompts[row], "wanted": told[0][row], "found": told[1][row], "nats_behind": 0.0}
        for row in rows
    ]


def _micro_f1(wanted: Chosen, found: Chosen, draws: Resamples | None = None) -> float:
    """F1 over all labels of all rows together, each row as often as it was drawn."""
    times = np.ones(len(wanted)) if draws is None else draws
    right, *either = (times @ one.sum(1) for one in (wanted & found, wanted, found))
    return float(_f1(right, *either))


def _f1(right: npt.NDArray[Any], wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """F1, and 0 where nothing is expected or found."""
    result: npt.NDArray[Any] = 2 * right / np.maximum(wanted + found, 1e-9)
    return result


def _without_none(names: Sequence[str]) -> list[int]:
    return [place for place, name in enumerate(names) if name != NONE]
