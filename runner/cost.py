"""What the stages of a plan will cost: parameters, tokens, operations, memory and time, from the records of this machine.

Time is what records of the same kind took: for each operation of a training, else for the whole stage. The range is from the
fastest of them to the slowest, so a guess from unlike runs says so itself. Records of other machines do not count.
"""

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.models import architectures
from runner.artifacts import Checkpoint
from runner.cache.record import Record
from runner.cache.store import Store
from runner.graph import edges
from runner.plan import RUNNABLE, Entry, Plan
from runner.recipe import Recipe
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretrain
from runner.stages.row_training import PackedTraining, RowTraining
from runner.stages.tokenizer import TrainTokenizer
from runner.stages.training import TrainingStage
from runner.workers.launch import gpu_count

AHEAD = (*RUNNABLE, "waiting")  # states of what will run
BYTES_PER_TOKEN = 4.0  # of text, where nothing better is known
UNPACKED = 3.0  # times the size of a compressed file
STATE_BYTES = 16  # per weight that learns: itself, its gradient and two moments, all in fp32
ACTIVATION_BYTES = 40  # per position of a micro-batch, layer and channel; measured on shapes from 2.6M to 29M parameters
MICRO_BATCH_TOKENS = 4096  # what "auto" comes to on a CPU


@dataclass(frozen=True)
class Shape:
    """A model as far as its cost goes."""

    parameters: int
    layers: int
    hidden_size: int
    flops_per_token: float  # forward and backward


@dataclass(frozen=True)
class Cost:
    """What one stage will cost; None where nothing tells."""

    parameters: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory: float | None = None  # bytes at the peak
    seconds: float | None = None
    low: float | None = None  # seconds, if it goes as fast as the fastest record
    high: float | None = None
    runs: int = 0  # records that it rests on


def costs(recipe: Recipe, plan: Plan, records: Sequence[Record], *, measured: float | None = None) -> dict[str, Cost]:
    """The cost of each stage that will run. `measured` is how many operations per second a pretraining did
    just now; it counts for other trainings, too, where there is no record of their kind."""
    here = [record for record in records if _is_here(record)]
    shapes: dict[str, Shape | None] = {}
    return {entry.name: _cost(recipe, plan, entry, here, shapes, measured) for entry in plan if entry.state in AHEAD}


def expected_seconds(recipe: Recipe, store: Store) -> dict[str, float]:
    """What each stage that will run is thought to take, as far as records tell."""
    found = costs(recipe, Plan(recipe, store), store.records())
    return {name: cost.seconds for name, cost in found.items() if cost.seconds is not None}


def total(found: Mapping[str, Cost]) -> Cost:
    """Time of all stages together; None as soon as one is unknown."""

    def summed(values: Iterator[float | None]) -> float | None:
        known = list(values)
        return None if None in known else math.fsum(value for value in known if value is not None)

    every = list(found.values())
    return Cost(
        seconds=summed(cost.seconds for cost in every),
        low=summed(cost.low for cost in every),
        high=summed(cost.high for cost in every),
        runs=min((cost.runs for cost in every), default=0),
    )


def _cost(
    recipe: Recipe,
    plan: Plan,
    entry: Entry,
    records: Sequence[Record],
    shapes: dict[str, Shape | None],
    measured: float | None,
) -> Cost:
    alike = [record for record in records if record.kind == entry.stage.kind]
    if not isinstance(entry.stage, TrainingStage):
        took = [float(record.data["seconds"]) for record in alike]
        return Cost(seconds=_middle(took), low=min(took, default=None), high=max(took, default=None), runs=len(took))
    shape = _shape(recipe, plan, entry.name, shapes)
    tokens = _tokens(plan, entry.stage)
    flops = shape.flops_per_token * tokens if shape and tokens else None
    paces = [pace for record in alike if (pace := _pace(record))]  # seconds per operation
    memory = _memory(shape, entry.stage, alike) if shape else None
    if measured is not None and (isinstance(entry.stage, Pretrain) or not paces):
        paces = [1 / measured]
    times = [pace * flops for pace in paces] if flops else []
    return Cost(
        parameters=shape.parameters if shape else None,
        tokens=tokens,
        flops=flops,
        memory=memory,
        seconds=_middle(times),
        low=min(times, default=None),
        high=max(times, default=None),
        runs=len(times),
    )


def _shape(recipe: Recipe, plan: Plan, name: str, known: dict[str, Shape | None]) -> Shape | None:
    """The model that a stage trains: its own architecture, or that of the checkpoint it begins with."""
    if name in known:
        return known[name]
    stage = recipe.stages[name]
    known[name] = None
    if isinstance(stage, Pretrain):
        known[name] = _fresh_shape(recipe, stage)
    elif (path := plan.entries[name].path) and issubclass(stage.makes, Checkpoint):
        known[name] = _written_shape(json.loads(Checkpoint(path).config.read_text(encoding="utf-8")))
    else:
        bases = [str(ref) for _, ref in edges(stage) if issubclass(ref.wants, Checkpoint)]
        known[name] = _shape(recipe, plan, bases[0], known) if bases else None
    return known[name]


def _fresh_shape(recipe: Recipe, stage: Pretrain) -> Shape | None:
    pack = recipe.stages[stage.tokens]
    tokenizer = recipe.stages[pack.tokenizer] if isinstance(pack, Pack) else None
    if not isinstance(pack, Pack) or not isinstance(tokenizer, TrainTokenizer):
        return None
    return _shape_of(stage.architecture, vocab_size=tokenizer.vocab_size, context=pack.context)


def _written_shape(found: Mapping[str, Any]) -> Shape | None:
    for architecture in architectures().values():
        if architecture.model_type == found.get("model_type"):
            config = architecture.from_transformers(found, dropout=0.0)
            return _shape_of(config, vocab_size=int(found["vocab_size"]), context=int(found["max_position_embeddings"]))
    return None


def _shape_of(config: Any, *, vocab_size: int, context: int) -> Shape:
    architecture = architectures()[config.name]
    return Shape(
        parameters=architecture.parameter_count(config, vocab_size=vocab_size),
        layers=config.layers,
        hidden_size=config.hidden_size,
        flops_per_token=architecture.flops_per_token(config, vocab_size=vocab_size, context=context),
    )


def _tokens(plan: Plan, stage: TrainingStage) -> float | None:
    """Positions that a training will compute."""
    budget = stage.budget
    if budget.tokens is not None:
        return float(budget.tokens)
    if budget.steps is not None:
        return float(budget.steps * stage.batch_tokens)
    assert budget.epochs is not None  # a budget has one of the three
    if isinstance(stage, Pretrain):
        record = plan.entries[stage.tokens].record
        return budget.epochs * float(record.data["metrics"]["train"]["tokens"]) if record else None
    if not isinstance(stage, PackedTraining):
        return None
    if any(table.files.hub for table in stage.tables()[0]):
        return None
    sizes = [table.weight * sum(map(_text_bytes, table.files.matches())) for table in stage.tables()[0]]
    own = 1 - math.fsum(table.share for table in stage.mix) if isinstance(stage, RowTraining) else 1.0
    return budget.epochs * math.fsum(sizes) / BYTES_PER_TOKEN / own


def _text_bytes(path: Path) -> float:
    return path.stat().st_size * (UNPACKED if path.suffix in (".gz", ".zst", ".parquet") else 1.0)


def _memory(shape: Shape, stage: TrainingStage, records: Sequence[Record]) -> float:
    """Bytes at the peak, by a rule of thumb that is corrected by what records of the same kind needed."""
    rows_tokens = MICRO_BATCH_TOKENS if stage.micro_batch == "auto" else stage.batch_tokens
    guess = (
        shape.parameters * STATE_BYTES
        + min(rows_tokens, stage.batch_tokens) * shape.layers * shape.hidden_size * ACTIVATION_BYTES
    )
    found = [
        float(record.data["metrics"]["peak_memory_bytes"])
        for record in records
        if record.data["metrics"].get("peak_memory_bytes")
        and 1 <= record.data["metrics"]["parameters"] / shape.parameters < 1.1  # adapters count as well
    ]
    return max(found) if found else float(guess)


def _pace(record: Record) -> float | None:
    """Seconds that a training took for each operation, with all that belongs to its stage."""
    flops = record.data["metrics"].get("flops")
    return float(record.data["seconds"]) / float(flops) if flops else None


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _is_here(record: Record) -> bool:
    """Whether a record is of a machine like this one."""
    hardware = record.data.get("hardware", {})
    return hardware.get("cores") == os.cpu_count() and bool(hardware.get("gpus")) == bool(gpu_count())
