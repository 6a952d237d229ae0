"""The task `lm_eval`: benchmarks of EleutherAI's lm-eval. Running them is `llm.evaluation.lm_eval_harness`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from runner.input_files import InputFolder
from runner.stage import Semantic
from runner.stages.fields.eval_tasks.task import EvalTask, EvaluatedModel, Limit, TaskName

if TYPE_CHECKING:
    from llm.evaluation.scoring import Outcome
    from llm.inference.batches import OnProgress


class LmEvalTask(EvalTask):
    """A benchmark of EleutherAI's lm-eval, run on the model as stock Transformers opens it; `pip install 'stockpot[lm-eval]'`.

    Also as a text: "lm_eval:arc_easy".
    """

    metrics: ClassVar[None] = None  # lm-eval decides

    name: Semantic[TaskName]
    """The first part of the names of its scores, which are called `name.metric`."""
    task: Semantic[Literal["lm_eval"]]
    """A benchmark of lm-eval."""
    benchmark: Semantic[Annotated[str, Field(min_length=1)]]
    """The name of the task in lm-eval, or in a file of `include_path`."""
    include_path: Semantic[InputFolder | None] = None
    """A folder with task files (.yaml) and their data. No code is taken from them."""
    shots: Semantic[Annotated[int, Field(ge=0)]] = 0
    """Solved examples before each question; with 0, as many as the task says."""
    chat: Semantic[bool] = False
    """Ask through the chat template, with the examples as turns."""
    limit: Semantic[Limit] = None
    """Most rows to use, the first ones."""

    def outcome(self, evaluated: EvaluatedModel, progress: "OnProgress") -> "Outcome":
        """Run the benchmark."""
        from llm.evaluation.lm_eval_harness import evaluate_folder

        def run() -> "Outcome":
            return evaluate_folder(
                evaluated.folder,
                self.benchmark,
                tasks=None if self.include_path is None else Path(self.include_path.pattern),
                shots=self.shots,
                chat=self.chat,
                limit=self.limit,
                scratch=evaluated.scratch,
                precision=evaluated.precision,
                device=str(evaluated.model.device),
            )

        progress(0, 1)
        return evaluated.processes.by_main(run)


def table_from_text(text: Any) -> Any:
    """The table that "lm_eval:arc_easy" is short for; ValueError for other texts. What is no text stays as it is."""
    if not isinstance(text, str):
        return text
    prefix, _, benchmark = text.partition(":")
    if prefix != "lm_eval" or not benchmark:
        raise ValueError(f'expected a table with a task, or a text such as "lm_eval:arc_easy", got {text!r}')
    return {"name": re.sub(r"[^A-Za-z0-9_-]", "-", benchmark), "task": "lm_eval", "benchmark": benchmark}
