"""What the stages of a plan will cost: parameters, tokens, floating-point operations, memory and time.

Time is estimated from the records of stages of the same kind on this machine. A training takes its start, as recorded, and its
work at the recorded speed; another stage takes as long as it took. The range goes from the fastest record to the slowest.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.training.micro_batch import auto_rows
from runner.cache.record import Record
from runner.cache.store import Store
from runner.planning.model_shape import Shape, adapter_of, shape_of_stage, text_bytes
from runner.planning.plan import RUNNABLE, Entry, Plan
from runner.recipe.branches import Attempts
from runner.recipe.recipe import Recipe
from runner.recipe.training_work import training_work
from runner.resources import available_cores, gpu_count
from runner.stages.fields.chat_training import PackedTraining, RowTraining
from runner.stages.fields.training import TrainingStage
from runner.stages.pretrain import Pretrain, Pretraining

AHEAD = (*RUNNABLE, "waiting")  # states of the stages that will run
PRETRAININGS = ("pretrain", "trunk")  # kinds that compute alike
BYTES_PER_TOKEN = 4.0  # of text
PROCESS_BYTES = 480 * 2**20  # of a worker on a CPU without a model: libraries, and memory that compiling leaves in use
STATE_BYTES = 16  # per trained weight: the weight, its gradient and two moments, all in fp32
FROZEN_BYTES = 4  # per weight that does not learn, at most
ACTIVATION_BYTES = 40  # per position of a micro-batch, layer and channel; measured on models of 2.6M to 29M parameters
LOGIT_BYTES, LOGIT_ROWS = 12, 512  # per token of the vocabulary, for as many positions as have their logits at a time
START_SECONDS = 5.0  # of a training without a record of its kind, before its first step and after its last


@dataclass(frozen=True)
class Cost:
    """The estimated cost of one stage; None where it is unknown."""

    parameters: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory: float | None = None  # bytes at the peak
    seconds: float | None = None
    low: float | None = None  # seconds, at the speed of the fastest record
    high: float | None = None  # of the slowest
    runs: int = 0  # records that the time comes from


def costs(
    plan: Plan, records: Sequence[Record], *, measured: Mapping[str, float] | None = None, machine: float | None = None
) -> dict[str, Cost]:
    """The cost of each stage that will run.

    `measured` has the speeds of trainings that were just measured, in operations per second, by kind; the first of them stands
    in for kinds without a record or a measurement. `machine` is the work per second that the machine was measured at once, for
    trainings of which nothing else is known.
    """
    here = [record for record in records if _is_here(record)]
    return {entry.name: _cost(plan, entry, here, measured or {}, machine) for entry in plan if entry.state in AHEAD}


def trainings_ahead(plan: Plan) -> dict[str, str]:
    """The first training of each kind that will run and whose model is known, by kind; pretrainings and trunks are alike."""
    found: dict[str, str] = {}
    for entry in plan:
        if entry.state in AHEAD and isinstance(entry.stage, TrainingStage) and shape_of_stage(plan, entry.name):
            found.setdefault(_alike(entry.stage), entry.name)
    return found


def _alike(stage: TrainingStage) -> str:
    """The kind whose speed a training has."""
    return PRETRAININGS[0] if stage.kind in PRETRAININGS else stage.kind


def kinds_ahead(plan: Plan) -> set[str]:
    """The kinds whose records tell what the stages that will run cost."""
    ahead = {entry.stage.kind for entry in plan if entry.state in AHEAD}
    return ahead | set(PRETRAININGS) if ahead & set(PRETRAININGS) else ahead


def expected_seconds(recipe: Recipe, store: Store) -> dict[str, float]:
    """Estimated seconds of each stage that will run, as far as they are known; 0 for spare attempts."""
    plan = Plan(recipe, store)
    found = costs(plan, store.records(kinds_ahead(plan)))
    known = {name: cost.seconds for name, cost in found.items() if cost.seconds is not None}
    return known | dict.fromkeys(spare_stages(plan), 0.0)


def spare_stages(plan: Plan) -> set[str]:
    """The stages of attempts that only run if an earlier attempt fails."""
    families = [family for family in plan.recipe.families.values() if isinstance(family, Attempts)]
    return {
        name
        for family in families
        for name, numbers in family.numbers.items()
        if min(numbers) > plan.selected[family.stage] and name in plan.entries
    }


def total(found: Mapping[str, Cost]) -> Cost:
    """The time of all stages together; None if that of any is unknown."""

    def summed(name: str) -> float | None:
        values = [getattr(cost, name) for cost in found.values()]
        return None if None in values else math.fsum(values)

    runs = min((cost.runs for cost in found.values()), default=0)
    return Cost(seconds=summed("seconds"), low=summed("low"), high=summed("high"), runs=runs)


def _cost(plan: Plan, entry: Entry, records: Sequence[Record], measured: Mapping[str, float], machine: float | None) -> Cost:
    kinds = PRETRAININGS if isinstance(entry.stage, Pretraining) else (entry.stage.kind,)
    alike = [record for record in records if record.kind in kinds]
    if not isinstance(entry.stage, TrainingStage):
        times = [float(record.data["seconds"]) for record in alike]
        return Cost(None, None, None, None, *_range(times), runs=len(times))
    shape = shape_of_stage(plan, entry.name)
    tokens = _tokens(plan, entry.stage)
    tokens = max(0.0, tokens - _behind(plan, entry)) if tokens else tokens
    flops = shape.flops_per_token * tokens if shape and tokens else None
    work = _work(flops, tokens, steps=tokens / entry.stage.batch_tokens) if flops and tokens else None
    paces = [pace for record in alike if (pace := _pace(record))]
    speed = measured.get(_alike(entry.stage)) or (None if paces else next(iter(measured.values()), None))
    if speed is not None and flops and work:
        start = _median([pace.start for pace in paces]) or 0.0
        paces = [Pace(start=start, seconds=flops / speed / work)]
    elif not paces and machine:
        paces = [Pace(start=START_SECONDS, seconds=1 / machine)]
    times = [pace.start + pace.seconds * work for pace in paces] if work else []
    memory = _memory(shape, entry.stage, alike) if shape else None
    return Cost(shape.parameters if shape else None, tokens, flops, memory, *_range(times), runs=len(times))


def _range(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Median, minimum and maximum; None of nothing."""
    return _median(seconds), min(seconds, default=None), max(seconds, default=None)


def _tokens(plan: Plan, stage: TrainingStage) -> float | None:
    """Positions that a training computes; None if unknown."""
    budget = stage.budget
    if budget.tokens is not None:
        return float(budget.tokens)
    if budget.steps is not None:
        return float(budget.steps * stage.batch_tokens)
    assert budget.epochs is not None  # a budget has one of the three
    if isinstance(stage, Pretraining):
        record = plan.entries[stage.tokens].record
        return budget.epochs * float(record.data["metrics"]["train"]["tokens"]) if record else None
    if not isinstance(stage, PackedTraining) or any(table.files.hub for table in stage.tables()[0]):
        return None
    sizes = [table.weight * sum(text_bytes(path) for path in table.files.matches()) for table in stage.tables()[0]]
    own = 1 - math.fsum(table.share for table in stage.mix) if isinstance(stage, RowTraining) else 1.0
    return budget.epochs * math.fsum(sizes) / BYTES_PER_TOKEN / own


def _behind(plan: Plan, entry: Entry) -> float:
    """Positions that the training which this one continues has computed."""
    if entry.beginning:
        return float(entry.beginning.data["metrics"]["tokens"])
    if isinstance(entry.stage, Pretrain) and entry.stage.trunk is not None:
        trunk = plan.entries[entry.stage.trunk].stage
        return (_tokens(plan, trunk) or 0.0) if isinstance(trunk, TrainingStage) else 0.0
    return 0.0


def _memory(shape: Shape, stage: TrainingStage, records: Sequence[Record]) -> float:
    """Bytes at the peak: measured by records of the same kind and size, else a rule of thumb."""
    adapter, rows = adapter_of(stage), stage.micro_batch
    if rows == "auto":
        device = "cuda" if gpu_count() else "cpu"
        rows = auto_rows(shape.row, flops_per_token=shape.flops_per_token, adapter=adapter is not None, device=device)
    positions = rows * shape.row
    state = shape.parameters * STATE_BYTES
    if adapter is not None:  # of its weights a rule of thumb: seven matrices of a layer, some of them wider
        learned = min(shape.parameters, 20 * shape.layers * shape.hidden_size * adapter.r)
        state = shape.parameters * FROZEN_BYTES + learned * STATE_BYTES
    estimate = (
        (0 if gpu_count() else PROCESS_BYTES)
        + state
        + min(positions, stage.batch_tokens) * shape.layers * shape.hidden_size * ACTIVATION_BYTES
        + min(positions, LOGIT_ROWS) * shape.vocab_size * LOGIT_BYTES
    )
    measured = [
        float(record.data["metrics"]["peak_memory_bytes"])
        for record in records
        if record.data["metrics"].get("peak_memory_bytes")
        and 1 <= record.data["metrics"].get("parameters", 0) / shape.parameters < 1.1  # those of adapters are included
    ]
    return max(measured) if measured else float(estimate)


@dataclass(frozen=True)
class Pace:
    """The speed of a training."""

    start: float  # seconds before the first step and after the last
    seconds: float  # per operation of its work


def _work(flops: float, tokens: float, *, steps: float) -> float:
    """The work of a training on this machine, in operations."""
    return training_work(flops, tokens, steps=steps, gpu=bool(gpu_count()))


def _pace(record: Record) -> Pace | None:
    """The speed of a recorded training; rough if it was interrupted, since the record has the time of its last part."""
    metrics, total_seconds = record.data["metrics"], float(record.data["seconds"])
    if not metrics.get("flops"):
        return None
    stepping = min(total_seconds, float(metrics.get("seconds", 0)))
    own = metrics["steps"] - metrics.get("first_step", 0)  # without those of the training that it continues
    tokens = metrics["tokens"] * own / metrics["steps"]
    return Pace(total_seconds - stepping, stepping / _work(metrics["flops"], tokens, steps=own))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _is_here(record: Record) -> bool:
    """Whether a record is of a machine like this one."""
    hardware = record.data.get("hardware", {})
    return hardware.get("cores") == available_cores() and bool(hardware.get("gpus")) == bool(gpu_count())
