"""What `run predict` predicts of a row: a label with probabilities, an answer, or a likelihood; by a task of the recipe.

A task of its evaluations says how a row becomes a prompt, and which labels there are. Probabilities are calibrated on that
task's own rows, whose labels are known.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm.data.conversations import LIST, NONE, Template, TextTemplate
from llm.data.turn import Turn
from llm.errors import InputError
from llm.text.templates import split_template
from runner.errors import RecipeError
from runner.input_files import InputFile
from runner.recipe.recipe import Recipe
from runner.recipe.validation import listed, nearest
from runner.stages.evaluate import Evaluate
from runner.stages.fields.eval_tasks.questions import AnswersTask, ChatTask, ClassificationTask, TextTask

if TYPE_CHECKING:
    from llm.evaluation.calibration import Floats
    from llm.evaluation.prediction import Predictor

CALIBRATED_ON = 512  # rows, at most
MAX_NEW_TOKENS = 128
Task = ClassificationTask | AnswersTask | TextTask
Row = dict[str, Any]


def task_of(recipe: Recipe, name: str | None) -> Task | None:
    """The task `name` of the recipe's evaluations, or the first of labels, else of answers, else of text; None without one.

    RecipeError for a name that no such task has.
    """
    tasks = [
        task
        for stage in recipe.stages.values()
        if isinstance(stage, Evaluate)
        for task in stage.tasks
        if isinstance(task, ClassificationTask | AnswersTask | TextTask)
    ]
    if name is not None:
        names = list(dict.fromkeys(task.name for task in tasks))
        if name not in names:
            expected = listed(names) if names else "a recipe with such a task"
            raise RecipeError(f"--task: expected {expected}, got {name!r}{nearest(name, names)}")
        return next(task for task in tasks if task.name == name)
    for kind in (ClassificationTask, AnswersTask, TextTask):
        if found := next((task for task in tasks if isinstance(task, kind)), None):
            return found
    return None


def asked_task(*, prompt: str | None, text: str | None, file: Path) -> Task:
    """A task that is in no recipe: to answer prompts by a template, or to score texts. `file` stands for its rows."""
    files = InputFile(str(file), Path.cwd())
    if prompt is not None:
        return AnswersTask(name="answers", task="answers", files=files, prompt=prompt, max_new_tokens=MAX_NEW_TOKENS)
    return TextTask(name="text", task="text", files=files, text=text or "text")


@dataclass(frozen=True)
class Labels:
    """Predicts a label for each row."""

    predictor: "Predictor"
    template: Template
    labels: Sequence[str]  # as the model says them
    shown: Mapping[str, str] = field(default_factory=dict)  # what the rows call them, where that differs
    long: Literal["cut", "window", "fail"] = "cut"
    temperature: float = 1.0
    threshold: float | None = None  # rows may have several labels

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The label of each row, its probability, and those of all labels."""
        from llm.evaluation.calibration import probabilities

        scores = self.predictor.label_scores([prompt_of(self.template, row) for row in rows], self.labels, long=self.long)
        names = [self.shown.get(label, label) for label in self.labels]
        found = []
        for shares in probabilities(scores, self.temperature):
            each = {f"probability_{name}": float(f"{share:.6g}") for name, share in zip(names, shares, strict=True)}
            found.append({**self._chosen(shares, names), **each})
        return found

    def _chosen(self, shares: "Floats", names: Sequence[str]) -> Row:
        """The label with its probability; or all labels, in a list, or as the rows of the task write them."""
        from llm.evaluation.multi_label import chosen_labels

        if self.threshold is None:
            best = int(shares.argmax())
            return {"prediction": names[best], "probability": float(f"{shares[best]:.6g}")}
        chosen = chosen_labels(shares[None], self.threshold, self.labels)[0]
        several = [name for name, label, one in zip(names, self.labels, chosen, strict=True) if one and label != NONE]
        separator = self.template.several
        return {"prediction": several if separator in (LIST, None) else separator.join(several)}


@dataclass(frozen=True)
class Answered:
    """Writes an answer to each row."""

    predictor: "Predictor"
    template: Template
    max_new_tokens: int = MAX_NEW_TOKENS

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The answer to each row, and whether it was cut."""
        prompts = [prompt_of(self.template, row) for row in rows]
        found = self.predictor.answers(prompts, max_new_tokens=self.max_new_tokens)
        return [{"answer": text, "answer_is_cut": cut} for text, cut in found]


@dataclass(frozen=True)
class Likelihood:
    """Scores the text of each row."""

    predictor: "Predictor"
    template: TextTemplate

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The log-likelihood of each text in nats, its tokens, and its bits per byte."""
        texts = [self.template.turns(row)[0].content for row in rows]
        return [
            {
                "log_likelihood": float(f"{nats:.7g}"),
                "tokens": tokens,
                "bits_per_byte": float(f"{-nats / math.log(2) / len(text.encode()):.6g}"),
            }
            for text, (nats, tokens) in zip(texts, self.predictor.text_likelihoods(texts), strict=True)
        ]


Prediction = Labels | Answered | Likelihood


def prediction_of(
    task: Task, predictor: "Predictor", say: Callable[[str], None], *, max_new_tokens: int | None = None
) -> Prediction:
    """What the task predicts; labels are calibrated first, and `say` is told how well. An answer has at most half of the
    context.
    """
    if isinstance(task, TextTask):
        return Likelihood(predictor, task.template)
    if isinstance(task, AnswersTask):
        limit = max_new_tokens or task.max_new_tokens or MAX_NEW_TOKENS
        return Answered(predictor, task.template, min(limit, predictor.model.context // 2))
    prompts, expected = _known_rows(task)
    shown = {word: label for label, word in task.words.items()}
    seen = sorted({label for of_row in expected for label in of_row})
    labels = [task.words.get(label, label) for label in task.labels] if task.labels else seen
    if NONE in seen and NONE not in labels:
        labels.append(NONE)
    if len(labels) < 2:
        raise InputError(f"{task.files.pattern}: expected rows of at least two labels, got {len(labels)}")
    found = Labels(predictor, task.template, labels, shown, task.long)
    known = [place for place, of_row in enumerate(expected) if set(of_row) <= set(labels)]
    say(f"reading {len(known):,} rows whose labels are known first: how sure the model may be is learned from them")
    scores = predictor.label_scores([prompts[place] for place in known], labels, long=task.long)
    if task.has_several_labels:
        return _with_threshold(found, task, [expected[place] for place in known], scores, say)
    return _calibrated(found, task.name, [labels.index(expected[place][0]) for place in known], scores, say)


def _calibrated(labels: Labels, name: str, numbers: Sequence[int], scores: "Floats", say: Callable[[str], None]) -> Labels:
    from llm.evaluation.calibration import calibrate

    found = calibrate(scores, numbers)
    gap = f"mean gap to how often they are right: {found.before:.3f} before, {found.after:.3f} after"
    if found.helps:
        how = f"calibrated on {len(numbers):,} rows of the task {name!r}, temperature {found.temperature:.3g}"
    else:
        how = f"left as they are, since no temperature helps on {len(numbers):,} rows of the task {name!r}"
    say(f"probabilities are {how}; {gap}, on rows that did not choose it")
    return replace(labels, temperature=found.temperature)


def _with_threshold(
    labels: Labels, task: ClassificationTask, expected: Sequence[Sequence[str]], scores: "Floats", say: Callable[[str], None]
) -> Labels:
    """Labels that are chosen by the threshold of the task, or else by the best one for its rows."""
    import numpy as np

    from llm.evaluation.calibration import probabilities
    from llm.evaluation.multi_label import best_threshold

    wanted = np.array([[label in of_row for label in labels.labels] for of_row in expected])
    threshold = task.threshold or best_threshold(probabilities(scores), wanted, labels.labels)
    say(
        f"rows have every label that is at least {threshold:.2g} times as likely as the likeliest one"
        + ("" if task.threshold else f": best on {len(expected):,} rows of the task {task.name!r}")
    )
    return replace(labels, threshold=threshold)


def prompts_of(task: ChatTask) -> list[tuple[list[Turn], tuple[str, ...]]]:
    """The prompts of the task's own rows, at most CALIBRATED_ON spread evenly, each with its labels."""
    from llm.data.chat_dataset import read_turns
    from llm.text.selection import evenly_spaced

    rows = read_turns(task.files.fetched(), task.template)
    usable = [(turns[:-1], labels) for _, turns, _, labels in rows if not isinstance(turns, InputError)]
    if not usable:
        raise InputError(f"{task.files.pattern}: expected rows of the task {task.name!r}, got none that can be used")
    return evenly_spaced(usable, min(CALIBRATED_ON, len(usable)))


def _known_rows(task: ChatTask) -> tuple[list[list[Turn]], list[tuple[str, ...]]]:
    """The prompts of the task's own rows, and their labels."""
    chosen = prompts_of(task)
    return [turns for turns, _ in chosen], [labels for _, labels in chosen]


def prompt_of(template: Template, row: Mapping[str, Any]) -> list[Turn]:
    """The turns of a row up to the answer, which it need not have."""
    if template.messages is None:
        return Template(template.prompt, "?").turns(row)[:-1]
    turns = Template(messages=template.messages).turns(row)
    return turns[:-1] if turns[-1].role == "assistant" else turns


def needed_fields(template: Template | TextTemplate) -> set[str]:
    """The fields that a row to predict for has to have."""
    if isinstance(template, TextTemplate) or template.messages is not None:
        return template.fields
    return set(split_template(template.prompt)[1::2])


def predicted(prediction: Prediction, rows: Iterable[Mapping[str, Any] | InputError]) -> list[Row]:
    """Each row with its prediction beside its fields; with the field `error` instead if it cannot be used."""
    from runner.serving.predicted_rows import plain_row

    kept = [dict(row) if not isinstance(row, InputError) else row for row in rows]
    good = {place: row for place, row in enumerate(kept) if not isinstance(row, InputError)}
    found: dict[int, Row] = {}
    try:
        found = dict(zip(good, prediction.predict(list(good.values())), strict=True)) if good else {}
    except InputError:  # of one of the rows: each alone
        for place, row in good.items():
            try:
                (found[place],) = prediction.predict([row])
            except InputError as error:
                found[place] = {"error": str(error)}
    result = []
    for place, one in enumerate(kept):
        fields = plain_row(one) if isinstance(one, dict) else {"error": str(one)}
        result.append(fields | {_free(name, fields): value for name, value in found.get(place, {}).items()})
    return result


def _free(name: str, fields: Mapping[str, Any]) -> str:
    """The name of a new field, which no field of the row has."""
    while name in fields:
        name = f"predicted_{name}"
    return name
