"""`run bench`: what is measured, and the process that measures it. The measurements are in `llm.bench`.

This process does not import torch. The worker is started like that of a stage, with the same threads and environment, and
leaves its result in a file. Its messages go to standard error, so that standard output has only the result.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.bench.workload import Workload, reference_workload
from runner.artifacts import Tokens
from runner.cache.store import Store
from runner.errors import RecipeError, StageError
from runner.execution import launch
from runner.planning.plan import Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores
from runner.safe_path import PYTHON
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretrain
from runner.stages.tokenizer import TrainTokenizer

MEASUREMENTS = ("matmul", "train", "decode", "memory", "machinery")
# Only by --only: classification; three trainings in memory at once; fine-tuning; large heads; rows of up to 16,384 positions;
# two trainings on a recipe's tokens for the whole time.
LABELS, PROCESSES, LORA, HEAD, CONTEXT, LEARNING = "labels", "processes", "lora", "head", "context", "learning"
PACE = "pace"  # our steps alone, for `run plan --measure`
PACE_SECONDS = 5.0
JOB, RESULT = "job.json", "result.json"
CHECKPOINT_MINUTES = Pretrain.model_fields["checkpoint_minutes"].default


@dataclass(frozen=True)
class BenchJob:
    """What the worker measures, and how."""

    workload: Mapping[str, Any]  # of llm.bench.workload, as JSON
    about: Mapping[str, Any]  # recipe and stage of the sizes; copied into the result
    checkpoint_minutes: float | None
    seconds: float  # per measurement
    compiled: bool  # whether anything is compiled, Transformers included
    only: list[str]  # of MEASUREMENTS, LABELS, PROCESSES, LORA, HEAD, CONTEXT and LEARNING
    checkpoint_every: int | None = None  # steps
    tokens: str | None = None  # folder of packed tokens; without it, rows are made up
    schedule: Mapping[str, Any] | None = None  # of the recipe's training
    held_out: str | None = None  # folder of packed tokens of the validation set


def reference_job(*, seconds: float, compiled: bool, only: list[str]) -> BenchJob:
    """The model and step of the published figures."""
    if LEARNING in only:
        raise RecipeError("--only learning: expected a RECIPE whose tokens to train on, got none")
    return BenchJob(
        workload=reference_workload(cores=available_cores(), compiled="auto" if compiled else False).model_dump(mode="json"),
        about={"recipe": None, "stage": None},
        checkpoint_minutes=CHECKPOINT_MINUTES,
        seconds=seconds,
        compiled=compiled,
        only=only,
    )


def recipe_job(recipe: Recipe, store: Store, *, seconds: float, compiled: bool, only: list[str]) -> BenchJob:
    """The first pretraining of a recipe. Its tokens are used if they are in the cache; no stage needs to have run."""
    name, stage = _pretraining(recipe)
    pack = recipe.stages[stage.tokens]
    tokenizer = recipe.stages[pack.tokenizer] if isinstance(pack, Pack) else None
    if not isinstance(pack, Pack) or not isinstance(tokenizer, TrainTokenizer):
        raise RecipeError(
            f"{recipe.path}: stage.{name}: bench: expected tokens of a pack stage with a tokenizer stage, got others"
        )
    rows = stage.batch_tokens // pack.context
    if not rows:
        raise RecipeError(
            f"{recipe.path}: stage.{name}.batch_tokens: expected at least one row of {pack.context} tokens, "
            f"got {stage.batch_tokens}"
        )
    assert stage.architecture is not None  # or it would not have been chosen
    workload = Workload(
        architecture=stage.architecture.with_context(pack.context),
        vocab_size=tokenizer.vocab_size,
        context=pack.context,
        rows=rows,
        micro_batch=stage.micro_batch,
        optimizer=stage.optimizer,
        precision=recipe.head.parallel.precision,
        compiled=recipe.head.parallel.compile if compiled else False,
        fused_attention=recipe.head.parallel.fused_attention if compiled else False,
        recompute=stage.recompute,
        cores=available_cores(),
    )
    packed = Plan(recipe, store, until=stage.tokens).entries[stage.tokens].path
    if LEARNING in only and packed is None:
        raise RecipeError(
            f"{recipe.path}: stage.{stage.tokens}: bench: expected its tokens in the cache, got none; "
            f"`run {recipe.path} --until {stage.tokens}` makes them"
        )
    return BenchJob(
        workload=workload.model_dump(mode="json"),
        about={"recipe": recipe.head.name, "stage": name},
        checkpoint_every=stage.checkpoint_every,
        checkpoint_minutes=stage.checkpoint_minutes,
        tokens=str(Tokens(packed).train) if packed else None,
        seconds=seconds,
        compiled=compiled,
        only=only,
        schedule=stage.schedule.model_dump(mode="json"),
        held_out=str(Tokens(packed).validation) if packed else None,
    )


def chosen(only: str | None) -> list[str]:
    """The measurements that `--only` names, in the order in which they run; without it, MEASUREMENTS."""
    possible = (*MEASUREMENTS, LABELS, PROCESSES, LORA, HEAD, CONTEXT, LEARNING)
    names = MEASUREMENTS if only is None else only.split(",")
    if unknown := [name for name in names if name not in possible]:
        raise RecipeError(f"--only: expected some of {','.join(possible)}, got {unknown[0]!r}")
    return [name for name in possible if name in names]


def measure(job: BenchJob) -> dict[str, Any]:
    """Runs the worker and returns its result; StageError if it failed."""
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        Path(folder, JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [*PYTHON, "-m", "runner.diagnostics.bench_worker", folder]
        compiled = Path(folder, "compiled")  # empty, so that compile times are real
        environment = launch.environment_of(available_cores(), compiled=compiled)
        with launch.started(command, log=sys.stderr.buffer, environment=environment) as process:
            code = launch.wait(process, tick=lambda: None, stopping=lambda: False)
        if code != 0:
            raise StageError(f"bench: its worker ended with exit code {code}; its messages are above")
        result: dict[str, Any] = json.loads(Path(folder, RESULT).read_text(encoding="utf-8"))
        return result


def measured_speed(recipe: Recipe, store: Store) -> float:
    """Operations per second of the first pretraining of a recipe, measured now."""
    job = recipe_job(recipe, store, seconds=PACE_SECONDS, compiled=False, only=[PACE])
    return float(measure(job)[PACE]["flops_per_second"])


def _pretraining(recipe: Recipe) -> tuple[str, Pretrain]:
    for name, stage in recipe.stages.items():
        if isinstance(stage, Pretrain) and stage.architecture is not None:
            return name, stage
    raise RecipeError(f"{recipe.path}: expected a stage of kind 'pretrain', whose model and step to measure, got none")
