"""What the stages of a plan will cost: parameters, tokens, operations, memory and time, from the records of this machine.

Time is what records of the same kind took: of a training or an evaluation for its work, by its size, and for its start; of
another stage altogether. The range is from the fastest of them to the slowest, so a guess from unlike runs says so itself.
Records of other machines do not count.
"""

import json
import math
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.models import architectures
from runner.artifacts import Checkpoint
from runner.cache.record import Record
from runner.cache.store import Store
from runner.graph import edges
from runner.planning.plan import RUNNABLE, Entry, Plan
from runner.recipe.branches import Attempts
from runner.recipe.recipe import Recipe
from runner.resources import available_cores, gpu_count
from runner.stages.evaluate import Evaluate
from runner.stages.fields.chat_training import PackedTraining, RowTraining
from runner.stages.fields.training import TrainingStage
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretrain, Pretraining
from runner.stages.tokenizer import TrainTokenizer

if TYPE_CHECKING:
    from llm.models.interface import ModelConfig

SAMPLE = 1 << 18  # bytes of a file
UNPACKED = 3.0  # times the size of a compressed file whose beginning is not looked at


@dataclass(frozen=True)
class TextSize:
    """The text of a file, uncompressed."""

    bytes: float
    rows: float  # lines


def text_size(path: Path) -> TextSize:
    """A guess for one file, exact where it is no longer than the sample."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLE)
    if path.suffix in (".zst", ".parquet"):
        return TextSize(size * UNPACKED, size * UNPACKED / 500)
    text = zlib.decompressobj(wbits=31).decompress(head) if path.suffix == ".gz" else head
    whole = size / len(head) if head else 0.0
    return TextSize(len(text) * whole, text.count(b"\n") * whole)


AHEAD = (*RUNNABLE, "waiting")  # states of what will run
BYTES_PER_TOKEN = 4.0  # of text, where nothing better is known
PROCESS_BYTES = 480 * 2**20  # of a worker on a CPU before it has a model: libraries, and what compiling leaves
STATE_BYTES = 16  # per weight that learns: itself, its gradient and two moments, all in fp32
ACTIVATION_BYTES = 40  # per position of a micro-batch, layer and channel; measured on shapes from 2.6M to 29M parameters
MICRO_BATCH_TOKENS = 4096  # what "auto" comes to on a CPU
# What a step takes beside its matrix products, in operations that would take as long: for each step, and for each position of
# it. Measured on 2 cores in bf16, nothing else running: 2,048 positions of 9.3 and 33.8 Gflop in 0.073 and 0.211 s, 4,096
# of 18.5 and 67.7 in 0.105 and 0.311, and of an adapter 9.8 and 35.3 in 0.057 and 0.153. On a GPU it was not measured.
STEP_FLOPS, POSITION_FLOPS = 2.5e9, 1.0e6
# Likewise of a position that is only read; and how many of them are read in the time in which a batch writes one token.
# Measured there: 33,000 to 43,000 positions/s at 0.7M parameters, 20,000 to 23,000 at 2.6M, where 2,300 tokens/s are written.
READ_FLOPS, READ_IN_ONE_WRITTEN = 3.5e6, 8
WRITTEN_SHARE = 0.7  # of max_new_tokens, before an answer ends


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
    """What each stage that will run is thought to take, as far as records tell; for a spare attempt, nothing."""
    plan = Plan(recipe, store)
    found, needless = costs(recipe, plan, store.records()), spare(plan)
    known = {name: cost.seconds for name, cost in found.items() if cost.seconds is not None}
    return known | dict.fromkeys(needless, 0.0)


def spare(plan: Plan) -> set[str]:
    """The stages of attempts that only run if one before them fails."""
    families = [family for family in plan.recipe.families.values() if isinstance(family, Attempts)]
    return {
        name
        for family in families
        for name, numbers in family.places.items()
        if min(numbers) > plan.standing[family.stage] and name in plan.entries
    }


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
    kinds = ("pretrain", "trunk") if isinstance(entry.stage, Pretraining) else (entry.stage.kind,)
    alike = [record for record in records if record.kind in kinds]
    if isinstance(entry.stage, Evaluate):
        asked, shape = _asked(entry.stage), _shape(recipe, plan, entry.name, shapes)
        if asked and shape and (known := [reading for record in alike if (reading := _reading(record, records))]):
            return _timed(known, asked * (shape.flops_per_token / 3 + READ_FLOPS), Cost())
    if not isinstance(entry.stage, TrainingStage):
        took = [float(record.data["seconds"]) for record in alike]
        return Cost(seconds=_middle(took), low=min(took, default=None), high=max(took, default=None), runs=len(took))
    shape = _shape(recipe, plan, entry.name, shapes)
    tokens = _tokens(plan, entry.stage)
    tokens = max(0.0, tokens - _behind(plan, entry)) if tokens else tokens
    flops = shape.flops_per_token * tokens if shape and tokens else None
    work = _work(flops, tokens, steps=tokens / entry.stage.batch_tokens) if flops and tokens else None
    paces = [pace for record in alike if (pace := _pace(record))]
    memory = _memory(shape, entry.stage, alike) if shape else None
    if measured is not None and flops and work and (isinstance(entry.stage, Pretraining) or not paces):
        start = _middle([pace.start for pace in paces]) or 0.0
        paces = [Pace(start=start, seconds=flops / measured / work)]
    return _timed(paces, work, Cost(parameters=shape.parameters if shape else None, tokens=tokens, flops=flops, memory=memory))


def _timed(paces: Sequence["Pace"], work: float | None, cost: Cost) -> Cost:
    """The cost with the time that the work takes at each pace."""
    times = [pace.start + pace.seconds * work for pace in paces] if work else []
    return replace(cost, seconds=_middle(times), low=min(times, default=None), high=max(times, default=None), runs=len(times))


def _shape(recipe: Recipe, plan: Plan, name: str, known: dict[str, Shape | None]) -> Shape | None:
    """The model that a stage trains: its own architecture, or that of the checkpoint it begins with."""
    if name in known:
        return known[name]
    stage = recipe.stages[name]
    known[name] = None
    if isinstance(stage, Pretraining):
        known[name] = _fresh_shape(recipe, stage)
    elif (path := plan.entries[name].path) and issubclass(stage.makes, Checkpoint):
        known[name] = _written_shape(json.loads(Checkpoint(path).config.read_text(encoding="utf-8")))
    else:
        bases = [str(ref) for _, ref in edges(stage) if issubclass(ref.wants, Checkpoint)]
        known[name] = _shape(recipe, plan, bases[0], known) if bases else None
    return known[name]


def _fresh_shape(recipe: Recipe, stage: Pretraining) -> Shape | None:
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


def _shape_of(config: "ModelConfig", *, vocab_size: int, context: int) -> Shape:
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
    if isinstance(stage, Pretraining):
        record = plan.entries[stage.tokens].record
        return budget.epochs * float(record.data["metrics"]["train"]["tokens"]) if record else None
    if not isinstance(stage, PackedTraining):
        return None
    if any(table.files.hub for table in stage.tables()[0]):
        return None
    sizes = [table.weight * sum(text_size(path).bytes for path in table.files.matches()) for table in stage.tables()[0]]
    own = 1 - math.fsum(table.share for table in stage.mix) if isinstance(stage, RowTraining) else 1.0
    return budget.epochs * math.fsum(sizes) / BYTES_PER_TOKEN / own


def _behind(plan: Plan, entry: Entry) -> float:
    """Positions of a training that another has computed, from which it goes on."""
    if entry.beginning:
        return float(entry.beginning.data["metrics"]["tokens"])
    if isinstance(entry.stage, Pretrain) and entry.stage.trunk is not None:
        trunk = plan.entries[entry.stage.trunk].stage
        return (_tokens(plan, trunk) or 0.0) if isinstance(trunk, TrainingStage) else 0.0
    return 0.0


def _memory(shape: Shape, stage: TrainingStage, records: Sequence[Record]) -> float:
    """Bytes at the peak, by a rule of thumb that is corrected by what records of the same kind needed."""
    rows_tokens = MICRO_BATCH_TOKENS if stage.micro_batch == "auto" else stage.batch_tokens
    guess = (
        (0 if gpu_count() else PROCESS_BYTES)
        + shape.parameters * STATE_BYTES
        + min(rows_tokens, stage.batch_tokens) * shape.layers * shape.hidden_size * ACTIVATION_BYTES
    )
    found = [
        float(record.data["metrics"]["peak_memory_bytes"])
        for record in records
        if record.data["metrics"].get("peak_memory_bytes")
        and 1 <= record.data["metrics"]["parameters"] / shape.parameters < 1.1  # adapters count as well
    ]
    return max(found) if found else float(guess)


@dataclass(frozen=True)
class Pace:
    """How fast a training or an evaluation went."""

    start: float  # seconds before its first step and after its last
    seconds: float  # for each operation of its work


def _work(flops: float, tokens: float, *, steps: float) -> float:
    """What a training takes, in operations: those of its matrix products, and as many as all else takes the time of."""
    return flops if gpu_count() else flops + tokens * POSITION_FLOPS + steps * STEP_FLOPS


def _pace(record: Record) -> Pace | None:
    """The pace of a training that was not interrupted; of others, as far as their stage's time tells."""
    metrics, took = record.data["metrics"], float(record.data["seconds"])
    if not metrics.get("flops"):
        return None
    stepping = min(took, float(metrics["seconds"]))
    own = metrics["steps"] - metrics.get("first_step", 0)  # those before are another's
    tokens = metrics["tokens"] * own / metrics["steps"]
    return Pace(took - stepping, stepping / _work(metrics["flops"], tokens, steps=own))


def _asked(stage: Evaluate) -> float | None:
    """Positions that an evaluation reads, those it writes counted by their time; None where a task has no files
    here."""
    asked = 0.0
    for task in stage.tasks:
        files = getattr(task, "files", None)
        if files is None or files.hub:
            return None
        sizes = [text_size(path) for path in files.matches()]
        rows, held = math.fsum(size.rows for size in sizes), math.fsum(size.bytes for size in sizes)
        used = min(rows, task.limit or rows)
        written = getattr(task, "max_new_tokens", 0) * WRITTEN_SHARE * READ_IN_ONE_WRITTEN
        asked += used * (held / rows / BYTES_PER_TOKEN + written) if rows else 0.0
    return asked


def _reading(record: Record, records: Sequence[Record]) -> Pace | None:
    """The pace of an evaluation, if its tasks tell how fast they went and records how large its model was."""
    tasks = record.data["metrics"].get("tasks", {}).values()
    if not tasks or any("prompt_tokens_per_second" not in task for task in tasks):
        return None
    written = [(task.get("new_tokens", 0), task.get("new_tokens_per_second", 1)) for task in tasks]
    read = [(task["prompt_tokens"], task["prompt_tokens_per_second"]) for task in tasks]
    took = math.fsum(tokens / max(speed, 1) for tokens, speed in [*read, *written])
    positions = sum(tokens for tokens, _ in read) + READ_IN_ONE_WRITTEN * sum(tokens for tokens, _ in written)
    flops = _read_flops(record, {other.key: other for other in records})
    start = max(0.0, float(record.data["seconds"]) - took)
    return Pace(start, took / (positions * (flops + READ_FLOPS))) if flops and positions else None


def _read_flops(record: Record, known: Mapping[str, Record]) -> float | None:
    """Operations of a position that the model of an evaluation reads, from the training that the model comes from."""
    for summary in record.data.get("inputs", {}).values():
        source = known.get(str(summary.get("key")))
        if source is None:
            continue
        metrics = source.data["metrics"]
        found = float(metrics["flops"]) / metrics["tokens"] / 3 if metrics.get("flops") else _read_flops(source, known)
        if found is not None:
            return found
    return None


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _is_here(record: Record) -> bool:
    """Whether a record is of a machine like this one."""
    hardware = record.data.get("hardware", {})
    return hardware.get("cores") == available_cores() and bool(hardware.get("gpus")) == bool(gpu_count())
