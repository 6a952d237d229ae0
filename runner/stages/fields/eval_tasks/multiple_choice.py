"""The task `multiple_choice`: each row has its own answers, one of them right."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from llm.data.choices import ChoiceTemplate
from llm.text.templates import split_template
from runner.input_files import InputFile
from runner.stage import Semantic
from runner.stages.fields.data_tables import OnBadRow
from runner.stages.fields.eval_tasks.task import EvalTask, EvaluatedModel, Limit, TaskName
from runner.stages.fields.reading import PartOfRows, Reading, form_of

if TYPE_CHECKING:
    from llm.evaluation.scoring import Outcome
    from llm.inference.batches import OnProgress


class MultipleChoiceTask(EvalTask):
    """Accuracy of choosing the likeliest of a row's own answers; also with log-probabilities divided by the answers' bytes."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_per_byte")

    name: Semantic[TaskName]
    """The first part of the names of its scores, which are called `name.metric`."""
    task: Semantic[Literal["multiple_choice"]]
    """Several answers, one of them right."""
    files: Semantic[InputFile]
    """Path, glob or folder: .jsonl, .json, .csv, .tsv (also .gz, .zst), .xlsx, .ods or .parquet."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    split: Semantic[PartOfRows | None] = None
    """The part of the rows: to train, validate or test on."""
    prompt: Semantic[str] = "{question}"
    """What the user says; {name} stands for the field of a row."""
    choices: Semantic[str | Annotated[list[str], Field(min_length=2)]] = "choices"
    """The field that holds a list of answers (or their { text, label }), or a template for each: ["{A}", "{B}"]."""
    answer: Semantic[str] = "answer"
    """The field that says which answer is right: its text, its label, its letter, or its number."""
    first: Semantic[Literal[0, 1]] = 0
    """The number of the first answer, where `answer` holds a number."""
    limit: Semantic[Limit] = None
    """Most rows to use, spread evenly over the files."""
    on_bad_row: Semantic[OnBadRow] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @field_validator("prompt", "choices")
    @classmethod
    def _are_templates(cls, value: str | list[str], info: ValidationInfo) -> str | list[str]:
        for template in [value] if info.field_name == "prompt" else value if isinstance(value, list) else ():
            split_template(str(template))
        return value

    @property
    def template(self) -> ChoiceTemplate:
        """How a row becomes a chat for each answer."""
        choices = self.choices if isinstance(self.choices, str) else tuple(self.choices)
        return ChoiceTemplate(self.prompt, choices, self.answer, self.first, form_of(self.read, self.split))

    def outcome(self, evaluated: EvaluatedModel, progress: "OnProgress") -> "Outcome":
        """Score the model on the rows of the task."""
        from llm.evaluation.bootstrap import fingerprint
        from llm.evaluation.multiple_choice import read_choices, score_choices

        questions, skipped = read_choices(self.files.fetched(), self.template, skip_bad=self.on_bad_row == "skip")
        used = self.limited(questions, self.files.pattern)
        found = score_choices(
            evaluated.model, evaluated.tokenizer, questions=used, progress=progress, processes=evaluated.processes
        )
        examples = fingerprint(json.dumps([turn.message for chat in one.chats for turn in chat]) for one in used)
        return replace(found, facts={**found.facts, "skipped_rows": skipped, "examples": examples})
