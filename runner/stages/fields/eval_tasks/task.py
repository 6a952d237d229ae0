"""What every task of an evaluation has: a name, a limit of rows, and `outcome`, which scores a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import Field

from llm.text.selection import evenly_spaced
from runner.stage import Spec

if TYPE_CHECKING:
    from llm.device import Precision
    from llm.evaluation.scoring import Outcome
    from llm.inference.batches import OnProgress
    from llm.inference.processes import Processes
    from llm.models.interface import LanguageModel
    from llm.tokenizer.tokenizer import TextTokenizer

T = TypeVar("T")
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Limit = Annotated[int, Field(gt=0)] | None


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that a task scores, and what the task needs beside it."""

    model: "LanguageModel"
    tokenizer: "TextTokenizer"
    folder: Path  # the same model as stock Transformers opens it
    scratch: Path
    others: Mapping[str, Path]  # folders of the models that it is compared with, by stage
    precision: "Precision"  # of the products of all of them
    processes: "Processes"  # that score it together


class EvalTask(Spec):
    """One task of an evaluation. A subclass has a literal field `task` by which a recipe chooses it, and `metrics`."""

    if TYPE_CHECKING:  # each task declares its fields itself, in the order in which they are documented
        name: TaskName
        limit: Limit

    def outcome(self, evaluated: EvaluatedModel, progress: "OnProgress") -> "Outcome":
        """Score the model on the rows of the task."""
        raise NotImplementedError

    def limited(self, rows: list[T], files: str) -> list[T]:
        """At most `limit` of the rows, spread evenly; InputError if there are none."""
        from llm.errors import InputError

        if not rows:
            raise InputError(f"{files}: expected rows for the task {self.name!r}, got none that can be used")
        return rows if self.limit is None else evenly_spaced(rows, self.limit)
