"""How much rows of each label count in the loss of a training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from llm.errors import InputError

ClassWeights = Literal["balanced"] | Mapping[str, float]  # by the text of the answer
MOST_LABELS = 1000  # that may be balanced: rows with more answers than this are no labels


def class_factors(answers: Sequence[tuple[str, float]], weights: ClassWeights) -> dict[str, float]:
    """How often the targets of each label count; `answers` are the labels of rows, with how often each counts.

    "balanced" is rows / (labels * rows of the label), so that all labels count alike and the mean over the rows is 1 (King and
    Zeng 2001, and `class_weight` of scikit-learn). InputError for a weight of a label that no row has.
    """
    rows: Counter[str] = Counter()
    for answer, count in answers:
        rows[answer] += count  # type: ignore[assignment]  # a fraction, of rows with several labels
    if weights != "balanced":
        if unknown := sorted(set(weights) - set(rows)):
            seen = ", ".join(map(repr, sorted(rows)[:20]))
            raise InputError(f"class_weights: expected labels of the rows, {seen}, got {unknown[0]!r}")
        return {answer: weights.get(answer, 1.0) for answer in rows}
    if len(rows) > MOST_LABELS:
        raise InputError(
            f"class_weights: expected rows with labels, at most {MOST_LABELS:,} different ones, got {len(rows):,} answers"
        )
    return {answer: rows.total() / (len(rows) * count) for answer, count in rows.items()}
