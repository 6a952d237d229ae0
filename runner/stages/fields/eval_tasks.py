"""What an evaluation asks of a model: one class per task, whose fields a recipe writes. The measuring is `llm.evaluation.scoring`'s.

A task reads its rows as questions and gives an `Outcome`: scores, examples and facts. A new one is a class here, in `Task`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from llm.data.conversations import TextTemplate
from llm.text.selection import evenly_spaced
from llm.text.templates import split_template, split_text
from runner.artifacts import Checkpoint
from runner.input_files import InputFile
from runner.stage import Ref, Semantic, Spec
from runner.stages.fields.data_tables import RowTable

if TYPE_CHECKING:
    from llm.evaluation.scoring import Outcome, Question
    from llm.inference.likelihood import Progress
    from llm.models.interface import LanguageModel
    from llm.tokenizer.tokenizer import TextTokenizer

T = TypeVar("T")
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
    """Path or glob: .jsonl, .txt, .csv or .tsv (also .gz, .zst), or .parquet."""
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

    def outcome(self, subject: "Subject", progress: "Progress") -> "Outcome":
        """The scores of the task."""
        return _of_questions(self, subject, progress)

    def score(
        self, model: "LanguageModel", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of its rows."""
        from llm.evaluation.scoring import score_texts

        texts = [question.turns[-1].content for question in questions]
        return score_texts(model, tokenizer, texts=texts, progress=progress)


class ChatTask(RowTable):
    """What tasks on rows of prompts and responses share."""

    name: Semantic[Name]
    """The first part of its scores' names: `name.metric`."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""

    def outcome(self, subject: "Subject", progress: "Progress") -> "Outcome":
        """The scores of the task."""
        return _of_questions(self, subject, progress)

    def score(
        self, model: "LanguageModel", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of its rows."""
        raise NotImplementedError


class ClassificationTask(ChatTask):
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
                raise ValueError(f"expected labels that differ, got {label!r} twice")
        return labels

    def score(
        self, model: "LanguageModel", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluation.scoring import classify

        labels = self.labels and [self.words.get(label, label) for label in self.labels]
        return classify(model, tokenizer, questions=questions, labels=labels, progress=progress)


class PairsTask(Spec):
    """Accuracy and macro-F1 of naming how two texts relate: the rows of GLUE (Wang et al. 2018), as they are distributed."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    name: Semantic[Name]
    """The first part of its scores' names: `name.metric`."""
    task: Semantic[Literal["pairs"]]
    """Two texts and a label."""
    files: Semantic[InputFile]
    """Path or glob: .tsv, .jsonl or .csv (also .gz, .zst), or .parquet."""
    first: Semantic[str] = "sentence1"
    """The field of the one text."""
    second: Semantic[str] = "sentence2"
    """The field of the other."""
    label: Semantic[str] = "label"
    """The field of the label."""
    question: Semantic[str] = ""
    """What stands after both texts, such as "Do both say the same?"."""
    labels: Semantic[Annotated[list[str], Field(min_length=2)] | None] = None
    """The labels to choose from; by default those that occur in the rows."""
    words: Semantic[dict[str, str]] = Field(default_factory=dict)
    """What to ask of the model in place of a row's label, as { "0" = "no", "1" = "yes" }; by default the label itself."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @model_validator(mode="after")
    def _is_a_classification(self) -> Self:
        self._classification()
        return self

    def outcome(self, subject: "Subject", progress: "Progress") -> "Outcome":
        """The scores of the task."""
        return self._classification().outcome(subject, progress)

    def _classification(self) -> ClassificationTask:
        """The same as a classification of both texts together."""
        asked = "\n" + self.question.replace("{", "{{").replace("}", "}}") if self.question else ""
        return ClassificationTask(
            name=self.name,
            task="classification",
            files=self.files,
            prompt=f"{{{self.first}}}\n{{{self.second}}}{asked}",
            response=f"{{{self.label}}}",
            labels=self.labels,
            words=self.words,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
        )


class MultipleChoiceTask(Spec):
    """Accuracy of choosing the likeliest of a row's own answers; also with log-probabilities divided by the answers' bytes."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_per_byte")

    name: Semantic[Name]
    """The first part of its scores' names: `name.metric`."""
    task: Semantic[Literal["multiple_choice"]]
    """Several answers, one of them right."""
    files: Semantic[InputFile]
    """Path or glob: .jsonl, .csv or .tsv (also .gz, .zst), or .parquet."""
    prompt: Semantic[str] = "{question}"
    """What the user says; {name} stands for the field of a row."""
    choices: Semantic[str | Annotated[list[str], Field(min_length=2)]] = "choices"
    """The field that holds a list of answers (or their { text, label }), or a template for each: ["{A}", "{B}"]."""
    answer: Semantic[str] = "answer"
    """The field that says which is right: its text, its label, its letter, or its number."""
    first: Semantic[Literal[0, 1]] = 0
    """What a number in `answer` counts from."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @field_validator("prompt", "choices")
    @classmethod
    def _are_templates(cls, value: str | list[str], info: ValidationInfo) -> str | list[str]:
        for template in [value] if info.field_name == "prompt" else value if isinstance(value, list) else ():
            split_template(str(template))
        return value

    def outcome(self, subject: "Subject", progress: "Progress") -> "Outcome":
        """The scores of the task."""
        from llm.evaluation.bootstrap import fingerprint
        from llm.evaluation.multiple_choice import ChoiceTemplate, choose, read_choices

        choices = self.choices if isinstance(self.choices, str) else tuple(self.choices)
        template = ChoiceTemplate(self.prompt, choices, self.answer, self.first)
        questions, skipped = read_choices(self.files.fetched(), template, skip_bad=self.on_bad_row == "skip")
        used = _limited(questions, self.limit, self)
        found = choose(subject.model, subject.tokenizer, questions=used, progress=progress)
        examples = fingerprint(json.dumps([turn.message for chat in one.chats for turn in chat]) for one in used)
        return replace(found, facts={**found.facts, "skipped_rows": skipped, "examples": examples})


class TaskFolder(InputFile):
    """A folder of lm-eval's task files, relative to the recipe file that holds it. What its files say is identity."""

    allows_hub = False

    @property
    def pattern(self) -> str:
        """The absolute path of the folder."""
        return str(self.folder / self)

    def matches(self) -> list[Path]:
        """The files in it, sorted by path."""
        return sorted(path for path in Path(self.pattern).glob("*") if path.is_file())


class LmEvalTask(Spec):
    """A benchmark of EleutherAI's lm-eval, run on the model as stock Transformers opens it; `pip install 'stockpot[lm-eval]'`.

    Also as a text: "lm_eval:arc_easy".
    """

    metrics: ClassVar[None] = None  # lm-eval decides

    name: Semantic[Name]
    """The first part of its scores' names: `name.acc`."""
    task: Semantic[Literal["lm_eval"]]
    """One of lm-eval's."""
    benchmark: Semantic[Annotated[str, Field(min_length=1)]]
    """The name of the task in lm-eval, or in a file of `include_path`."""
    include_path: Semantic[TaskFolder | None] = None
    """A folder with task files (.yaml) and their data. No code is taken from them."""
    shots: Semantic[Annotated[int, Field(ge=0)]] = 0
    """Solved examples before each question; 0 is as the task says."""
    chat: Semantic[bool] = False
    """Ask through the chat template, with the examples as turns."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, the first ones."""

    def outcome(self, subject: "Subject", progress: "Progress") -> "Outcome":
        """The scores of the task."""
        from llm.evaluation.lm_eval_harness import evaluate_folder

        progress(0, 1)
        return evaluate_folder(
            subject.folder,
            self.benchmark,
            tasks=None if self.include_path is None else Path(self.include_path.pattern),
            shots=self.shots,
            chat=self.chat,
            limit=self.limit,
            scratch=subject.scratch,
        )


class AnswersTask(ChatTask):
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
        self, model: "LanguageModel", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluation.scoring import score_answers

        return score_answers(model, tokenizer, questions=questions, max_new_tokens=self.max_new_tokens, progress=progress)


class ComparisonTask(ChatTask):
    """Answers beside those of another model: nearer to the wanted ones? And how much longer, likelier, more repetitive?"""

    metrics: ClassVar[tuple[str, ...]] = (
        "win_rate",
        "likelihood_win_rate",
        "chrf_change",
        "bits_per_byte_change",
        "length_change",
        "repetition_change",
    )

    task: Semantic[Literal["compare"]]
    """Two models side by side."""
    against: Semantic[Ref[Checkpoint]]
    """The other model, usually the one that was adapted."""
    max_new_tokens: Semantic[Annotated[int, Field(gt=0)]] = 128
    """Longest answer to generate."""

    def score_beside(
        self,
        model: "LanguageModel",
        tokenizer: "TextTokenizer",
        questions: Sequence["Question"],
        *,
        other: Path,
        device: str,
        progress: "Progress",
    ) -> "Outcome":
        """The scores of the task; `other` is the folder of the model that answers beside it."""
        from llm.evaluation.pairwise import compare_models
        from llm.models.checkpoint import load_checkpoint
        from llm.tokenizer.tokenizer import TextTokenizer

        return compare_models(
            model,
            tokenizer,
            lambda: (load_checkpoint(other, device=device), TextTokenizer.load(other)),
            questions=questions,
            max_new_tokens=self.max_new_tokens,
            progress=progress,
        )


Table = Annotated[
    TextTask | ClassificationTask | PairsTask | MultipleChoiceTask | AnswersTask | ComparisonTask | LmEvalTask,
    Field(discriminator="task"),
]


def _from_text(value: Any) -> Any:
    """The table that "lm_eval:arc_easy" is short for."""
    if not isinstance(value, str):
        return value
    prefix, _, benchmark = value.partition(":")
    if prefix != "lm_eval" or not benchmark:
        raise ValueError(f'expected a table with a task, or a text such as "lm_eval:arc_easy", got {value!r}')
    return {"name": re.sub(r"[^A-Za-z0-9_-]", "-", benchmark), "task": "lm_eval", "benchmark": benchmark}


Task = Annotated[Table, BeforeValidator(_from_text, json_schema_input_type=Table | str)]


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: "LanguageModel"
    tokenizer: "TextTokenizer"
    folder: Path  # the same as stock Transformers opens it
    scratch: Path
    others: Mapping[str, Path]  # folders of models that it is compared with, by stage
    device: str


def _of_questions(task: TextTask | ChatTask, subject: Subject, progress: "Progress") -> "Outcome":
    from llm.evaluation.bootstrap import fingerprint

    model, tokenizer = subject.model, subject.tokenizer
    questions, skipped = _questions(task, tokenizer)
    if isinstance(task, ComparisonTask):
        other = subject.others[task.against]
        found = task.score_beside(model, tokenizer, questions, other=other, device=subject.device, progress=progress)
    else:
        found = task.score(model, tokenizer, questions, progress=progress)
    examples = fingerprint(json.dumps([turn.message for turn in question.turns]) for question in questions)
    return replace(found, facts={**found.facts, "skipped_rows": skipped, "examples": examples})


def _limited(rows: list[T], limit: int | None, task: "TextTask | ChatTask | MultipleChoiceTask") -> list[T]:
    """At most `limit` rows, evenly spread; InputError where there is none."""
    from llm.errors import InputError

    if not rows:
        raise InputError(f"{task.files.pattern}: expected rows for the task {task.name!r}, got none that can be used")
    return rows if limit is None else evenly_spaced(rows, limit)


def _questions(task: TextTask | ChatTask, tokenizer: "TextTokenizer") -> tuple[list["Question"], int]:
    """The rows of a task, and how many were skipped because they cannot be used."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError
    from llm.evaluation.scoring import Question

    questions: list[Question] = []
    skipped = 0
    for place, turns, _ in read_turns(task.files.fetched(), task.template):
        try:
            if isinstance(turns, InputError):
                raise turns
            if turns[-1].role != "assistant":
                raise InputError(
                    f"{place}: expected the assistant's turn last, the answer to score, got the {turns[-1].role}'s"
                )
            if task.on_bad_row == "skip" and isinstance(task, ChatTask):
                tokenizer.encode_chat([turn.message for turn in turns])  # refuses rows that hold special tokens
        except InputError:
            if task.on_bad_row == "fail":
                raise
            skipped += 1
        else:
            questions.append(Question(place, turns))
    return _limited(questions, task.limit, task), skipped
