"""`run bench`: what is measured, and the process that measures it. The measurements are in `llm.bench`.

This process does not import torch. The worker is started like that of a stage, with the same threads and environment, and
leaves its result in a file. Its messages go to standard error, so that standard output has only the result.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm.bench.workload import Workload, reference_workload
from runner.artifacts import Tokens
from runner.cache.store import Store
from runner.engine import launch
from runner.errors import RecipeError, StageError
from runner.graph import plain
from runner.planning.cost import trainings_ahead
from runner.planning.model_shape import Model, adapter_of, model_of_folder, model_of_stage, row_length
from runner.planning.plan import Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores
from runner.safe_path import PYTHON
from runner.stages.fields.training import TrainingStage
from runner.stages.lora import TrainAdapter
from runner.stages.pretrain import Pretrain

DECODE = "decode"
MEASUREMENTS = ("matmul", "train", DECODE, "memory", "machinery")
# Only by --only: classification; three trainings in memory at once; fine-tuning; large heads; rows of up to 16,384 positions;
# two trainings on a recipe's tokens for the whole time.
LABELS, PROCESSES, LORA, HEAD, CONTEXT, LEARNING = "labels", "processes", "lora", "head", "context", "learning"
PEFT = "peft"  # with LORA, for a workload with an adapter
PACE = "pace"  # our steps alone, for `run plan --measure`
PACE_SECONDS = 5.0
ROW, ROWS = 512, 8  # positions of a row and rows of a step, where no recipe says it
JOB, RESULT = "job.json", "result.json"
ADAPTER_FIELDS = ("r", "alpha", "dropout", "target_modules", "rslora", "dora", "modules_to_save")
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
    model: str | None = None  # a model folder as Transformers saves it, instead of drawn weights
    kind: str = ""  # of the stage whose chats are packed for that model
    fields: Mapping[str, Any] | None = None  # of that stage


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
    """The first pretraining of a recipe, else its first training. Its tokens are used if they are in the cache; no stage needs
    to have run, except where the model is one of the Hub.
    """
    plan = Plan(recipe, store)
    name = _training(recipe)
    job = training_job(plan, name, seconds=seconds, compiled=compiled, only=only)
    if LEARNING in only and job.tokens is None:
        tokens = getattr(recipe.stages[name], "tokens", None)
        raise RecipeError(
            f"{recipe.path}: stage.{tokens or name}: bench: expected its tokens in the cache, got none; "
            f"`run {recipe.path} --until {tokens or name}` makes them"
        )
    return job


def training_job(
    plan: Plan, name: str, *, seconds: float, compiled: bool, only: list[str], model: Model | None = None
) -> BenchJob:
    """The training `name` of a recipe, of its own model or of `model`."""
    recipe, stage, model = plan.recipe, plan.recipe.stages[name], model or model_of_stage(plan, name)
    assert isinstance(stage, TrainingStage)
    if model is None:
        raise RecipeError(
            f"{recipe.path}: stage.{name}: bench: expected a model whose sizes are known, got one that is not in the "
            "cache; run "
            "the stages before it first"
        )
    context = row_length(plan, name, model)
    rows = stage.batch_tokens // context
    if not rows:
        raise RecipeError(
            f"{recipe.path}: stage.{name}.batch_tokens: expected at least one row of {context} tokens, got "
            f"{stage.batch_tokens}"
        )
    adapter, parallel = adapter_of(stage), recipe.head.parallel
    workload = Workload(
        architecture=model.config.with_context(context),
        vocab_size=model.vocab_size,
        context=context,
        rows=rows,
        micro_batch=stage.micro_batch,
        optimizer=stage.optimizer,
        precision=parallel.precision,
        compiled=parallel.compile if compiled else False,
        fused_attention=parallel.fused_attention if compiled else False,
        recompute=stage.recompute,
        adapter=None if adapter is None else {field: getattr(adapter, field) for field in ADAPTER_FIELDS},
        quantize=getattr(stage, "quantize", None) is not None,
        cores=available_cores(),
    )
    tokens = getattr(stage, "tokens", None)
    packed = plan.entries[tokens].path if tokens is not None else None
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


def model_job(
    folder: Path, recipe: Recipe | None, store: Store, *, seconds: float, compiled: bool, only: list[str]
) -> BenchJob:
    """The fine-tuning of the model in `folder` with an adapter: as the first `lora` stage of a recipe has it, on its chats, or
    with the defaults on made-up rows."""
    model = model_of_folder(folder)
    if model is None:
        raise RecipeError(f"--model {folder}: expected a model folder of a supported architecture, got another")
    if recipe is not None:
        name = next((name for name, stage in recipe.stages.items() if isinstance(stage, TrainAdapter)), None)
        if name is None:
            raise RecipeError(f"{recipe.path}: expected a stage of kind 'lora' for --model, got none")
        job, stage = (
            training_job(Plan(recipe, store), name, seconds=seconds, compiled=compiled, only=only, model=model),
            recipe.stages[name],
        )
        return replace(job, model=str(folder.resolve()), kind=stage.kind, fields=plain(stage, file=lambda file: file.pattern))
    workload = Workload(
        architecture=model.config,
        vocab_size=model.vocab_size,
        context=min(ROW, model.context),
        rows=ROWS,
        compiled="auto" if compiled else False,
        fused_attention="auto" if compiled else False,
        adapter={"r": 16, "alpha": 32},
        cores=available_cores(),
    )
    about = {"recipe": None, "stage": None}
    dumped = workload.model_dump(mode="json")
    return BenchJob(dumped, about, CHECKPOINT_MINUTES, seconds, compiled, only, model=str(folder.resolve()))


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


def measured_speeds(plan: Plan) -> dict[str, float]:
    """Operations per second, by kind, of the first training of each kind that will run, measured now."""
    found = {}
    for kind, name in trainings_ahead(plan).items():
        job = training_job(plan, name, seconds=PACE_SECONDS, compiled=False, only=[PACE])
        found[kind] = float(measure(job)[PACE]["flops_per_second"])
    return found


def _training(recipe: Recipe) -> str:
    trainings = [name for name, stage in recipe.stages.items() if isinstance(stage, TrainingStage)]
    pretrainings = [name for name in trainings if isinstance(recipe.stages[name], Pretrain)]
    if not trainings:
        raise RecipeError(f"{recipe.path}: expected a stage that trains, whose model and step to measure, got none")
    return (pretrainings or trainings)[0]
