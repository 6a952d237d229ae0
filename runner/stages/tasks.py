"""What an evaluation asks of a model: one class per task, whose fields a recipe writes. The measuring is `llm.evaluate`'s.

A task reads its rows as questions and gives an `Outcome`: scores, examples and facts. A new one is a class here, in `Task`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from llm.templates import split_text
from llm.turns import TextTemplate
from runner.artifacts import Checkpoint
from runner.stage import InputFile, Ref, Semantic, Spec
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


class ChatTask(RowTable):
    """What tasks on rows of prompts and responses share."""

    name: Semantic[Name]
    """The first part of its scores' names: `name.metric`."""
    limit: Semantic[Limit | None] = None
    """Rows to use at most, evenly spread over the files."""


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
                raise ValueError(f"wants labels that differ, found {label!r} twice")
        return labels

    def score(
        self, model: "Llama", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluate import classify

        return classify(model, tokenizer, questions=questions, labels=self.labels, progress=progress)


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
        self, model: "Llama", tokenizer: "TextTokenizer", questions: Sequence["Question"], *, progress: "Progress"
    ) -> "Outcome":
        """The scores of the task."""
        from llm.evaluate import score_answers

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
        model: "Llama",
        tokenizer: "TextTokenizer",
        questions: Sequence["Question"],
        *,
        other: Path,
        device: str,
        progress: "Progress",
    ) -> "Outcome":
        """The scores of the task; `other` is the folder of the model that answers beside it."""
        from llm.checkpoint import load_checkpoint
        from llm.compare import compare_models
        from llm.tokenizer import TextTokenizer

        return compare_models(
            model,
            tokenizer,
            lambda: (load_checkpoint(other, device=device), TextTokenizer.load(other)),
            questions=questions,
            max_new_tokens=self.max_new_tokens,
            progress=progress,
        )


Task = Annotated[TextTask | ClassificationTask | AnswersTask | ComparisonTask, Field(discriminator="task")]


def questions_of(task: TextTask | ChatTask, tokenizer: "TextTokenizer") -> tuple[list["Question"], int]:
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
            if task.on_bad_row == "skip" and isinstance(task, ChatTask):
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
