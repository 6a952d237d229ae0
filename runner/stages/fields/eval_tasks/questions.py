"""The tasks on rows of text and of prompts with responses: `text`, `classification`, `answers` and `compare`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm.data.conversations import Template, TextTemplate
from runner.artifacts import Checkpoint
from runner.input_files import InputFile
from runner.stage import Ref, Semantic
from runner.stages.fields.data_tables import OnBadRow, RowTable, TextField
from runner.stages.fields.eval_tasks.task import EvalTask, EvaluatedModel, Limit, TaskName
from runner.stages.fields.reading import PartOfRows, Reading, form_of

if TYPE_CHECKING:
    from llm.evaluation.scoring import Outcome, Question
    from llm.inference.batches import OnProgress
    from llm.tokenizer.tokenizer import TextTokenizer


class QuestionTask(EvalTask):
    """A task whose rows are chats, or documents, that end with the text to score."""

    if TYPE_CHECKING:
        files: InputFile
        on_bad_row: OnBadRow

    @property
    def template(self) -> Template | TextTemplate:
        """How a row becomes a chat or a document."""
        raise NotImplementedError

    @property
    def has_several_labels(self) -> bool:
        """Whether a row may have several."""
        return False

    def score(self, evaluated: EvaluatedModel, questions: "Sequence[Question]", progress: "OnProgress") -> "Outcome":
        """Score the model on `questions`."""
        raise NotImplementedError

    def outcome(self, evaluated: EvaluatedModel, progress: "OnProgress") -> "Outcome":
        """Score the model on the rows of the task."""
        questions, skipped, examples = self.questions(evaluated.tokenizer)
        found = self.score(evaluated, questions, progress)
        return replace(found, facts={**found.facts, "skipped_rows": skipped, "examples": examples})

    def questions(self, tokenizer: "TextTokenizer | None") -> tuple[list["Question"], int, str]:
        """The rows to score, how many were skipped because they cannot be used, and a digest of those to score."""
        from llm.evaluation.bootstrap import fingerprint

        found, skipped = self._questions(tokenizer)
        texts = ([*(turn.message for turn in question.turns), *question.labels] for question in found)
        return found, skipped, fingerprint(map(json.dumps, texts))

    def _questions(self, tokenizer: "TextTokenizer | None") -> tuple[list["Question"], int]:
        """The rows to score, and how many were skipped because they cannot be used."""
        from llm.data.chat_dataset import read_turns
        from llm.errors import InputError
        from llm.evaluation.scoring import Question

        questions: list[Question] = []
        skipped = 0
        for place, turns, _, labels in read_turns(self.files.fetched(), self.template):
            try:
                if isinstance(turns, InputError):
                    raise turns
                if turns[-1].role != "assistant":
                    raise InputError(
                        f"{place}: expected the assistant's turn last, the answer to score, got the {turns[-1].role}'s"
                    )
                if tokenizer and self.on_bad_row == "skip" and isinstance(self, ChatTask):
                    tokenizer.encode_chat([turn.message for turn in turns])  # the template may refuse it
            except InputError:
                if self.on_bad_row == "fail":
                    raise
                skipped += 1
            else:
                questions.append(Question(place, turns, labels if self.has_several_labels else ()))
        return self.limited(questions, self.files.pattern), skipped


class TextTask(QuestionTask):
    """Perplexity and bits per byte of whole documents."""

    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "bits_per_byte")

    name: Semantic[TaskName]
    """The first part of the names of its scores, which are called `name.metric`."""
    task: Semantic[Literal["text"]]
    """Likelihood of text."""
    files: Semantic[InputFile]
    """Path, glob or folder: .jsonl, .json, .csv, .tsv, .txt, .md (also .gz, .zst), .xlsx, .ods, .parquet, .docx or .pdf."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    split: Semantic[PartOfRows | None] = None
    """The part of the rows: to train, validate or test on."""
    text: Semantic[TextField] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""
    limit: Semantic[Limit] = None
    """Most rows to use, spread evenly over the files."""
    on_bad_row: Semantic[OnBadRow] = "fail"
    """What to do with a row that cannot be used: stop with its file and line, or count it and go on."""

    @property
    def template(self) -> TextTemplate:
        """How a row becomes a document."""
        return TextTemplate(self.text, form_of(self.read, self.split))

    def score(self, evaluated: EvaluatedModel, questions: "Sequence[Question]", progress: "OnProgress") -> "Outcome":
        """Score the likelihood of the documents."""
        from llm.evaluation.scoring import score_texts

        texts = [question.turns[-1].content for question in questions]
        return score_texts(evaluated.model, evaluated.tokenizer, texts=texts, progress=progress, processes=evaluated.processes)


class ChatTask(RowTable, QuestionTask):
    """A task on prompts with responses, or on chats."""

    name: Semantic[TaskName]
    """The first part of the names of its scores, which are called `name.metric`."""
    limit: Semantic[Limit] = None
    """Most rows to use, spread evenly over the files."""


class ClassificationTask(ChatTask):
    """Accuracy, macro-F1 and expected calibration error (`ece`) of choosing the likeliest label; the response is the label.
    With `multi_label` micro-F1, macro-F1 and the share of rows of which all labels are right (`subset_accuracy`).

    The labels of pairs of texts too, as GLUE has them (Wang et al. 2018): prompt = "{sentence1}\\n{sentence2}".
    """

    task: Semantic[Literal["classification"]]
    """Choice among labels."""
    labels: Semantic[Annotated[list[str], Field(min_length=2)] | None] = None
    """The labels to choose from; by default those that occur in the rows."""
    long: Semantic[Literal["cut", "window", "fail"]] = "cut"
    """What to do with a row that is longer than the context: cut the end of what was filled into its prompt; or read it window
    by window and average the log-probabilities of each label; or fail."""

    threshold: Semantic[Annotated[float, Field(gt=0, le=1)] | None] = None
    """With `multi_label`: a label is chosen if it is at least this share as likely as the likeliest one; by default the share
    with the highest micro-F1, that of each half of the rows chosen on the other half."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        for number, label in enumerate(labels or ()):
            if labels and label in labels[:number]:
                raise ValueError(f"expected labels that differ, got {label!r} twice")
        return labels

    @model_validator(mode="after")
    def _threshold_of_several(self) -> Self:
        if self.threshold is not None and self.multi_label is None:
            raise ValueError("threshold: expected it only with multi_label, got it without")
        return self

    @property
    def has_several_labels(self) -> bool:
        """Whether a row may have several."""
        return self.multi_label is not None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The second parts of the names of its scores."""
        return ("micro_f1", "macro_f1", "subset_accuracy") if self.has_several_labels else ("accuracy", "macro_f1", "ece")

    def score(self, evaluated: EvaluatedModel, questions: "Sequence[Question]", progress: "OnProgress") -> "Outcome":
        """Score which label is likeliest after each prompt."""
        from llm.evaluation.classification import classify

        labels = self.labels and [self.words.get(label, label) for label in self.labels]
        return classify(
            evaluated.model,
            evaluated.tokenizer,
            questions=questions,
            labels=labels,
            long=self.long,
            several=self.has_several_labels,
            threshold=self.threshold,
            progress=progress,
            processes=evaluated.processes,
        )


class AnswersTask(ChatTask):
    """Likelihood of the responses after their prompts; of the answers that the model generates chrF and BLEU, their length
    over that of the responses, and the share of their text that repeats itself. Answers that look collapsed are warned of.
    """

    task: Semantic[Literal["answers"]]
    """Answers to prompts."""
    max_new_tokens: Semantic[Annotated[int, Field(ge=0)]] = 128
    """Most tokens of a generated answer; 0 generates none and leaves out what is measured of them."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The second parts of the names of its scores."""
        return (
            "perplexity",
            "bits_per_byte",
            *(("chrf", "bleu", "length_ratio", "repetition") if self.max_new_tokens else ()),
        )

    def score(self, evaluated: EvaluatedModel, questions: "Sequence[Question]", progress: "OnProgress") -> "Outcome":
        """Score the responses, and answers to their prompts."""
        from llm.evaluation.scoring import score_answers

        return score_answers(
            evaluated.model,
            evaluated.tokenizer,
            questions=questions,
            max_new_tokens=self.max_new_tokens,
            progress=progress,
            processes=evaluated.processes,
        )


class ComparisonTask(ChatTask):
    """Answers side by side with those of another model: how often nearer to the response, how much longer, likelier and more
    repetitive.
    """

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
    """Most tokens of a generated answer."""

    def score(self, evaluated: EvaluatedModel, questions: "Sequence[Question]", progress: "OnProgress") -> "Outcome":
        """Score the answers of both models."""
        from llm.evaluation.pairwise import compare_models
        from llm.models.checkpoint import load_checkpoint
        from llm.models.interface import dtype_of
        from llm.tokenizer.tokenizer import TextTokenizer

        other = evaluated.others[self.against]
        dtype, device = dtype_of(evaluated.precision), evaluated.model.device
        return compare_models(
            evaluated.model,
            evaluated.tokenizer,
            lambda: (load_checkpoint(other, dtype=dtype, device=device), TextTokenizer.load(other)),
            questions=questions,
            max_new_tokens=self.max_new_tokens,
            progress=progress,
            processes=evaluated.processes,
        )
