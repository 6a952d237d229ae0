"""The kind `evaluate`: what a model scores on held-out rows, and the gates that judge it.

    tasks = [
      { name = "section", task = "classification", files = "data/section_test.jsonl.gz", prompt = "Which section?\\n{text}",
        response = "{label}" },
      { name = "medical", task = "text", files = "data/medical_val.jsonl.gz" },
      { name = "answers", task = "answers", files = "data/qa_test.jsonl.gz", limit = 100 },
    ]
    gates = [{ score = "section.macro_f1", at_least = 0.90 }]

The measuring is `llm.evaluate`'s, the judging `runner.gates`'.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm.templates import split_text
from llm.turns import TextTemplate
from runner.artifacts import Checkpoint, Scores
from runner.files import write_whole
from runner.gates import Gate, Verdict, judge, unknown_score
from runner.stage import Context, Execution, InputFile, Metrics, Ref, Semantic, Spec, Stage
from runner.stages.data import RowTable

if TYPE_CHECKING:
    from llm.evaluate import Outcome, Question
    from llm.likelihood import Progress
    from llm.models.llama.model import Llama
    from llm.tokenizer import TextTokenizer

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Limit = Annotated[int, Field(gt=0)]


class TextTask(Spec):
    """Perplexity and bits per byte of whole documents."""

    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "bits_per_byte")

    name: Semantic[Name]
    """The first part of its scores' names: `name.perplexity`."""
    task: Semantic[Literal["text"]]
    """Likelihood of text."""
    files: Semantic[InputFile]
    """Path or glob: .jsonl, .txt or .csv (also .gz, .zst), or .parquet."""
    text: Semantic[str] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @field_validator("text")
    @classmethod
    def _is_field_or_template(cls, text: str) -> str:
        split_text(text)
        return text

    @property
    def template(self) -> TextTemplate:
        """How a row becomes a document."""
        return TextTemplate(self.text)

    def score(
        self, model: "Llama", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluate import score_texts

        texts = [question.turns[-1].content for question in questions]
        return score_texts(model, tokenizer, texts=texts, progress=progress)


class _ChatTask(RowTable):
    """What tasks on rows of prompts and responses share."""

    name: Semantic[Name]
    """The first part of its scores' names: `name.metric`."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""


class ClassificationTask(_ChatTask):
    """Accuracy and macro-F1 of choosing the likeliest label; the response is the label."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    task: Semantic[Literal["classification"]]
    """Choice among labels."""
    labels: Semantic[Annotated[list[str], Field(min_length=2)] | None] = None
    """The labels to choose from; by default those that occur in the rows."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        for number, label in enumerate(labels or ()):
            if labels and label in labels[:number]:
                raise ValueError(f"wants labels that differ, found {label!r} twice")
        return labels

    def score(
        self, model: "Llama", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluate import classify

        return classify(model, tokenizer, questions=questions, labels=self.labels, progress=progress)


class AnswersTask(_ChatTask):
    """Likelihood of the responses after their prompts, and chrF and BLEU of what the model answers itself."""

    task: Semantic[Literal["answers"]]
    """Answers to prompts."""
    max_new_tokens: Semantic[Annotated[int, Field(ge=0)]] = 128
    """Longest answer to generate; 0 generates none and leaves out chrF and BLEU."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The second parts of its scores' names."""
        return ("perplexity", "bits_per_byte", *(("chrf", "bleu") if self.max_new_tokens else ()))

    def score(
        self, model: "Llama", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluate import score_answers

        return score_answers(model, tokenizer, questions=questions, max_new_tokens=self.max_new_tokens, progress=progress)


Task = Annotated[TextTask | ClassificationTask | AnswersTask, Field(discriminator="task")]


class Evaluate(Stage, kind="evaluate", version=1, makes=Scores):
    """Scores a model on held-out rows: likelihood of text, classification, answers."""

    model: Semantic[Ref[Checkpoint]]
    """What is evaluated."""
    tasks: Semantic[Annotated[list[Task], Field(min_length=1)]]
    """What it is evaluated on."""
    gates: Execution[list[Gate]] = Field(default_factory=list)
    """What the scores have to be. Judged on every run; what needs this stage is not run while a gate fails."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are named {twice[0]!r}; their scores need names of their own")
        known = [f"{task.name}.{metric}" for task in self.tasks for metric in task.metrics]
        for gate in self.gates:
            if gate.score not in known:
                raise ValueError(unknown_score(gate.score, known))
        return self

    def run(self, context: Context) -> Metrics:
        """Score every task; a restart takes the tasks that were scored before."""
        import torch

        from llm.checkpoint import load_checkpoint
        from llm.evaluate import Outcome
        from llm.tokenizer import TextTokenizer

        checkpoint, made = context.open(self.model), Scores(context.work)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_checkpoint(checkpoint.folder, device=device)
        tokenizer = TextTokenizer.load(checkpoint.folder)
        outcomes: dict[str, Outcome] = {}
        for task in self.tasks:
            kept = context.scratch / "tasks" / f"{task.name}.json"
            if not kept.exists():
                questions, skipped = _questions(task, tokenizer)
                outcome = task.score(model, tokenizer, questions, progress=_progress(context, task.name))
                value = {**vars(outcome), "facts": {**outcome.facts, "skipped_rows": skipped}}
                write_whole(kept, json.dumps(value, ensure_ascii=False))
            outcomes[task.name] = Outcome(**json.loads(kept.read_text(encoding="utf-8")))
        scores = {f"{name}.{metric}": value for name, outcome in outcomes.items() for metric, value in outcome.scores.items()}
        counts = {name: outcome.rows for name, outcome in outcomes.items()}
        examples = [{"task": name, **example} for name, outcome in outcomes.items() for example in outcome.examples]
        write_whole(made.scores, json.dumps({"scores": scores, "counts": counts}, indent=2, sort_keys=True) + "\n")
        write_whole(made.errors, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
        return {"scores": scores, "tasks": {name: {"rows": counts[name], **outcomes[name].facts} for name in outcomes}}

    def verdicts(self, metrics: Metrics) -> Sequence[Verdict]:
        """The judgement of every gate."""
        return judge(self.gates, metrics["scores"])


def _questions(task: TextTask | _ChatTask, tokenizer: "TextTokenizer") -> tuple[list["Question"], int]:
    """The rows of a task, and how many were skipped because they cannot be used."""
    from llm.chat import read_turns
    from llm.errors import InputError
    from llm.evaluate import Question

    questions: list[Question] = []
    skipped = 0
    for place, turns, _ in read_turns(task.files.matches(), task.template):
        try:
            if isinstance(turns, InputError):
                raise turns
            if turns[-1].role != "assistant":
                raise InputError(
                    f"{place}: wants the assistant's turn last, the answer to score; found the {turns[-1].role}'s"
                )
            if task.on_bad_row == "skip" and isinstance(task, _ChatTask):
                tokenizer.encode_chat([turn.message for turn in turns])  # refuses rows that hold special tokens
        except InputError:
            if task.on_bad_row == "fail":
                raise
            skipped += 1
        else:
            questions.append(Question(place, turns))
    if not questions:
        raise InputError(f"{task.files.pattern}: wants rows for the task {task.name!r}; found none that can be used")
    if task.limit is not None and task.limit < len(questions):
        questions = [questions[index * len(questions) // task.limit] for index in range(task.limit)]
    return questions, skipped


def _progress(context: Context, name: str) -> "Progress":
    from llm.errors import Interrupted

    def progress(done: int, total: int) -> None:
        context.report(done=done, total=total, unit=f"rows of {name}")
        if context.should_stop():
            raise Interrupted(f"stopped while {name} was scored; tasks before it are kept")

    return progress
