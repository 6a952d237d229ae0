"""What a classification says of each label, as tables for the card and the report: from the record of an evaluation alone."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MOST_CLASSES = 50  # in the table of a card or report


class ClassScores(NamedTuple):
    """Scores by label of one task; cells are text."""

    task: str
    classes: list[list[str]]  # a head, and a row per label: precision, recall, F1, support
    labels: list[str]
    confusion: list[list[int]]  # of expected by chosen labels; empty for many labels, and where rows have several labels

    @property
    def confusion_table(self) -> list[list[str]]:
        """The confusion matrix with its labels: rows are what was expected, columns what was chosen."""
        rows = [[label, *map(str, counts)] for label, counts in zip(self.labels, self.confusion, strict=False)]
        return [["expected", *self.labels], *rows] if rows else []


def class_scores(metrics: Mapping[str, Any]) -> Iterator[ClassScores]:
    """The scores by label of each task of labels; of more than MOST_CLASSES labels, those with the lowest F1."""
    for task, facts in metrics.get("tasks", {}).items():
        classes = facts.get("classes", ())
        worst = sorted(classes, key=lambda one: one["f1"])[:MOST_CLASSES] if len(classes) > MOST_CLASSES else classes
        rows = [
            [one["label"], *(f"{one[name]:.4g}" for name in ("precision", "recall", "f1")), f"{one['support']:,}"]
            for one in worst
        ]
        if rows:
            head = ["label", "precision", "recall", "F1", "rows"]
            yield ClassScores(task, [head, *rows], list(facts["labels"]), facts.get("confusion", []))
