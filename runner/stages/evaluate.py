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
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from runner.artifacts import Checkpoint, Scores
from runner.files import write_whole
from runner.gates import Gate, Verdict, judge, unknown_score
from runner.stage import Context, Execution, Metrics, Ref, Semantic, Stage
from runner.stages.tasks import Task, questions_of

if TYPE_CHECKING:
    from llm.likelihood import Progress


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
                questions, skipped = questions_of(task, tokenizer)
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


def _progress(context: Context, name: str) -> "Progress":
    from llm.errors import Interrupted

    def progress(done: int, total: int) -> None:
        context.report(done=done, total=total, unit=f"rows of {name}")
        if context.should_stop():
            raise Interrupted(f"stopped while {name} was scored; tasks before it are kept")

    return progress
