"""The kind `baseline`: what a classification reaches without a language model, to hold the scores of a model against.

    [stage.baseline]
    kind = "baseline"
    data = [{ files = "data/section_train.jsonl.gz", prompt = "{text}", response = "{label}" }]
    tasks = [{ name = "section", task = "classification", files = "data/section_test.jsonl.gz", prompt = "{text}", ... }]

A gate of an `evaluate` stage with the same task then has `above = "baseline"`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from runner.artifacts import Scores
from runner.stage import Context, Metrics, Semantic, Stage
from runner.stages.fields.data_tables import RowTable, TrainingTable
from runner.stages.fields.eval_tasks.questions import ClassificationTask
from runner.stages.fields.score_files import write_scores

if TYPE_CHECKING:
    from llm.data.turn import Turn


class Baseline(Stage, kind="baseline", version=2, makes=Scores):
    """Scores TF-IDF of words and characters with logistic regression, which learns in seconds, on tasks of classification."""

    data: Semantic[Annotated[list[TrainingTable], Field(min_length=1)]]
    """The rows to learn from, as a training has them; each row counts once, whatever its weight."""
    tasks: Semantic[Annotated[list[ClassificationTask], Field(min_length=1)]]
    """The tasks to score, as in `evaluate`."""

    @property
    def score_names(self) -> Sequence[str]:
        """The scores of every task."""
        return [f"{task.name}.{metric}" for task in self.tasks for metric in task.metrics]

    @model_validator(mode="after")
    def _names_differ(self) -> "Baseline":
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: expected a different name for each task, got {twice[0]!r} twice")
        return self

    def run(self, context: Context) -> Metrics:
        """Learn and score, in one process without torch."""
        from llm.evaluation.baseline import classify_without_model

        train = [row for table in self.data for row in _rows(table)]
        outcomes = {}
        for task in self.tasks:
            context.report(note=f"{task.name}: learning from {len(train):,} rows")
            questions, skipped, examples = task.questions(None)
            labels = task.labels and [task.words.get(label, label) for label in task.labels]
            outcome = classify_without_model(
                train, questions, labels=labels, several=task.has_several_labels, threshold=task.threshold
            )
            outcome.facts.update(skipped_rows=skipped, examples=examples)
            outcomes[task.name] = outcome
        return write_scores(Scores(context.work), outcomes)


def _rows(table: RowTable) -> "list[tuple[list[Turn], tuple[str, ...]]]":
    """The usable rows of a table as chats, with their labels; InputError for another one unless it may be skipped."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError

    found = []
    for _, turns, _, labels in read_turns(table.files.fetched(), table.template):
        if not isinstance(turns, InputError):
            found.append((turns, labels))
        elif table.on_bad_row == "fail":
            raise turns
    return found
