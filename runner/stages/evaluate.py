"""The kind `evaluate`: the scores of a model on held-out rows, and the gates for them.

    tasks = [
      { name = "section", task = "classification", files = "data/section_test.jsonl.gz", prompt = "Which section?\\n{text}",
        response = "{label}" },
      { name = "medical", task = "text", files = "data/medical_val.jsonl.gz" },
      { name = "answers", task = "answers", files = "data/qa_test.jsonl.gz", limit = 100 },
    ]
    gates = [{ score = "section.macro_f1", at_least = 0.90 }]

`llm.evaluation` scores, `runner.gates` judges.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from runner.artifacts import Checkpoint, Scores
from runner.files import write_whole
from runner.gates import (
    TRAIN_GAP,
    EvaluationResult,
    Gate,
    judge,
    last_trainings,
    train_gap,
    unknown_score,
)
from runner.graph import inputs_of, plain
from runner.stage import Context, Execution, Lineage, Metrics, Ref, Semantic, Stage, Verdict
from runner.stages.fields.answers_page import page
from runner.stages.fields.eval_tasks import Task
from runner.stages.fields.eval_tasks.questions import ComparisonTask
from runner.stages.fields.eval_tasks.task import EvaluatedModel
from runner.stages.fields.score_files import write_scores
from runner.stages.fields.training import TrainingStage

if TYPE_CHECKING:
    import torch

    from llm.evaluation.scoring import Outcome
    from llm.inference.batches import OnProgress
    from llm.inference.processes import Processes


class Evaluate(Stage, kind="evaluate", version=6, makes=Scores):
    """Scores a model on held-out rows: likelihood of text, classification, multiple choice, answers, benchmarks."""

    imports = ("llm.evaluation.scoring",)
    in_processes = True

    model: Semantic[Ref[Checkpoint]]
    """The model to evaluate."""
    tasks: Semantic[Annotated[list[Task], Field(min_length=1)]]
    """The tasks to evaluate it on."""
    gates: Execution[list[Gate]] = Field(default_factory=list)
    """Bounds for the scores, judged on every run. Stages that need this one do not run while a gate fails."""

    @property
    def has_gates(self) -> bool:
        """Whether it has gates."""
        return bool(self.gates)

    @property
    def score_names(self) -> Sequence[str]:
        """The scores of every task; of one that lm-eval scores, the prefix of their names."""
        return [f"{task.name}.{metric}" for task in self.tasks for metric in (task.metrics or ("",))]

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: expected a different name for each task, got {twice[0]!r} twice")
        known = [TRAIN_GAP, *(score for score in self.score_names if not score.endswith("."))]
        open_names = tuple(score for score in self.score_names if score.endswith("."))  # not known before
        for gate in self.gates:
            if gate.score not in known and not gate.score.startswith(open_names):
                raise ValueError(unknown_score(gate.score, known))
        return self

    def faults_among(self, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Gates that can never be judged."""
        for number, gate in enumerate(self.gates):
            if gate.above is not None:
                name, other = gate.score.partition(".")[0], stages[gate.above]
                theirs = [_rows(task) for task in other.tasks if task.name == name] if hasattr(other, "tasks") else []
                if theirs != [_rows(task) for task in self.tasks if task.name == name]:
                    yield (
                        f"gates[{number}].above: expected an evaluation with the same task {name!r}, to compare example by "
                        f"example, got {str(gate.above)!r} with another or none"
                    )
            if gate.score == TRAIN_GAP:
                trainings = last_trainings(self.model, inputs_of(stages), lambda name: stages[name].trains)
                if not trainings:
                    yield f"gates[{number}].score: expected a model that this recipe trains, got {str(self.model)!r}"
                for name in trainings:
                    training = stages[name]
                    if isinstance(training, TrainingStage) and not training.holds_out:
                        yield f"gates[{number}].score: expected held-out rows in stage {name!r}, got none; set `validation`"

    def run(self, context: Context) -> Metrics:
        """Score every task, the rows shared by all processes; a restart keeps the tasks that were scored before."""
        from llm.inference.processes import join

        processes, device = join()
        outcomes = self._outcomes(context, processes, device)
        if not processes.is_main:
            return {}
        artifact, metrics = Scores(context.work), write_scores(Scores(context.work), outcomes)
        for name in (task.name for task in self.tasks if isinstance(task, ComparisonTask)):
            prefix, one = f"{name}.", outcomes[name]
            intervals = {
                key.removeprefix(prefix): ends for key, ends in metrics["intervals"].items() if key.startswith(prefix)
            }
            write_whole(artifact.side_by_side(name), page(name, one.examples, scores=one.scores, intervals=intervals))
        return metrics

    def _outcomes(self, context: Context, processes: "Processes", device: "torch.device") -> "dict[str, Outcome]":
        """The outcome of each task by its name; each is kept in scratch once it is there."""
        from llm.device import resolve_precision
        from llm.evaluation.scoring import Outcome
        from llm.models.checkpoint import load_checkpoint
        from llm.models.interface import dtype_of
        from llm.tokenizer.tokenizer import TextTokenizer

        folder = context.open(self.model).folder
        precision = processes.exchange(resolve_precision(context.parallel.precision, device=device))[0]
        compared = [task.against for task in self.tasks if isinstance(task, ComparisonTask)]
        evaluated = EvaluatedModel(
            load_checkpoint(folder, dtype=dtype_of(precision), device=device),
            TextTokenizer.load(folder),
            folder,
            context.scratch,
            {str(other): context.open(other).folder for other in compared},
            precision,
            processes,
        )
        outcomes = {}
        for task in self.tasks:
            kept = context.scratch / "tasks" / f"{task.name}.json"
            if not processes.exchange(kept.exists())[0]:
                outcome = task.outcome(evaluated, _progress(context, task.name))
                outcome = replace(outcome, facts={**outcome.facts, "precision": precision})
                for sentence in outcome.facts.get("warnings", ()):
                    context.report(note=f"warning: {task.name}: {sentence}")
                if processes.is_main:
                    write_whole(kept, json.dumps(vars(outcome), ensure_ascii=False))
            text = processes.by_main(partial(kept.read_text, encoding="utf-8"))
            outcomes[task.name] = Outcome(**json.loads(text))
        return outcomes

    def verdicts(self, metrics: Metrics, lineage: Lineage) -> Sequence[Verdict]:
        """The verdict on every gate."""
        found = EvaluationResult.of(metrics)
        others = {name for gate in self.gates if (name := gate.above) is not None and name in lineage.records}
        if any(gate.score == TRAIN_GAP for gate in self.gates):
            found = replace(found, scores={**found.scores, **train_gap(self.model, lineage)})
        return judge(self.gates, found, {str(name): EvaluationResult.of(lineage.records[name]["metrics"]) for name in others})


def _rows(task: Task) -> Any:
    """A task as plain data, to compare with another."""
    return plain(task, file=lambda file: file.pattern)


def _progress(context: Context, name: str) -> "OnProgress":
    from llm.errors import Interrupted

    def progress(done: int, total: int) -> None:
        context.report(done=done, total=total, unit=f"rows of {name}")
        if context.should_stop():
            raise Interrupted(f"stopped while {name} was scored; tasks before it are kept")

    return progress
