"""`run bench`: what is measured, the process that measures it, and the table. The measuring itself is `llm.bench`.

Torch stays out of this process: the worker is started as a stage's is, with the same threads and environment, and leaves its
result in a file. What it says meanwhile goes to standard error, so that standard output holds the result alone.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llm.bench.workload import Workload, reference_workload
from runner.artifacts import Tokens
from runner.cache.store import Store
from runner.errors import RecipeError, StageError
from runner.execution import launch
from runner.files import write_whole
from runner.planning.plan import Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretrain
from runner.stages.tokenizer import TrainTokenizer

if TYPE_CHECKING:
    from rich.table import Table

MEASUREMENTS = ("matmul", "train", "decode", "memory", "machinery")
PROCESSES = "processes"  # only where it is asked for: it holds three trainings at once
LORA = "lora"  # only where it is asked for: what adapting takes, which is about fine-tuning
LEARNING = "learning"  # only where it is asked for: it trains twice for the whole time, on a recipe's tokens
PACE = "pace"  # our steps alone, for `run plan --measure`
PACE_SECONDS = 5.0
JOB, RESULT = "job.json", "result.json"
CHECKPOINT_MINUTES = Pretrain.model_fields["checkpoint_minutes"].default


@dataclass(frozen=True)
class BenchJob:
    """Everything the worker needs to know."""

    workload: Mapping[str, Any]  # of llm.bench.workload, as JSON
    about: Mapping[str, Any]  # where the sizes come from; goes into the result as it is
    checkpoint_every: int | None  # steps
    checkpoint_minutes: float | None
    tokens: str | None  # folder of packed tokens, for real rows
    seconds: float  # per measurement
    compiled: bool  # whether anything is compiled, Transformers too
    only: list[str]  # of MEASUREMENTS, PROCESSES, LORA and LEARNING
    schedule: Mapping[str, Any] | None = None  # of the recipe's training
    held_out: str | None = None  # folder of packed tokens that nothing is learned from

    def write(self, path: Path) -> None:
        """Saves the job as JSON."""
        write_whole(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The job that `write` saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def reference_job(*, seconds: float, compiled: bool, only: list[str]) -> BenchJob:
    """The size that our figures are given for."""
    if LEARNING in only:
        raise RecipeError("--only learning: expected a recipe, whose tokens are learned")
    return BenchJob(
        workload=reference_workload(cores=available_cores(), compiled="auto" if compiled else False).model_dump(mode="json"),
        about={"recipe": None, "stage": None},
        checkpoint_every=None,
        checkpoint_minutes=CHECKPOINT_MINUTES,
        tokens=None,
        seconds=seconds,
        compiled=compiled,
        only=only,
    )


def recipe_job(recipe: Recipe, store: Store, *, seconds: float, compiled: bool, only: list[str]) -> BenchJob:
    """The first pretraining of a recipe; its tokens are read where they are in the cache, and nothing has to have run."""
    name, stage = _pretraining(recipe)
    pack = recipe.stages[stage.tokens]
    tokenizer = recipe.stages[pack.tokenizer] if isinstance(pack, Pack) else None
    if not isinstance(pack, Pack) or not isinstance(tokenizer, TrainTokenizer):
        raise RecipeError(f"{recipe.path}: stage.{name}: bench: expected tokens of a pack stage with a tokenizer of its own")
    rows = stage.batch_tokens // pack.context
    if not rows:
        raise RecipeError(
            f"{recipe.path}: stage.{name}.batch_tokens: found {stage.batch_tokens}, "
            f"expected at least one row of {pack.context} tokens"
        )
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
            f"{recipe.path}: stage.{stage.tokens}: bench: expected its tokens to learn from, and they are not in the cache; "
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
    """The measurements that `--only` names, in the order in which they are made; without it, MEASUREMENTS."""
    possible = (*MEASUREMENTS, PROCESSES, LORA, LEARNING)
    names = MEASUREMENTS if only is None else only.split(",")
    if unknown := [name for name in names if name not in possible]:
        raise RecipeError(f"--only: expected some of {','.join(possible)}, got {unknown[0]!r}")
    return [name for name in possible if name in names]


def measure(job: BenchJob) -> dict[str, Any]:
    """The result of the worker, which has the machine to itself as far as this program goes; StageError if it failed."""
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        job.write(Path(folder, JOB))
        command = [sys.executable, "-m", "runner.diagnostics.bench_worker", folder]
        compiled = Path(folder, "compiled")  # empty, so that compiling takes the time that it takes
        environment = launch.environment_of(available_cores(), compiled=compiled)
        with launch.started(command, log=sys.stderr.buffer, environment=environment) as process:
            code = launch.wait(process, tick=lambda: None, stopping=lambda: False)
        if code != 0:
            raise StageError(f"bench: its worker ended with exit code {code}; what it said stands above")
        result: dict[str, Any] = json.loads(Path(folder, RESULT).read_text(encoding="utf-8"))
        return result


def measured_speed(recipe: Recipe, store: Store) -> float:
    """Operations per second of the first pretraining of a recipe, as this machine does them now."""
    job = recipe_job(recipe, store, seconds=PACE_SECONDS, compiled=False, only=[PACE])
    return float(measure(job)[PACE]["flops_per_second"])


def _pretraining(recipe: Recipe) -> tuple[str, Pretrain]:
    for name, stage in recipe.stages.items():
        if isinstance(stage, Pretrain):
            return name, stage
    raise RecipeError(f"{recipe.path}: found no stage of kind 'pretrain', whose model and step bench would measure")


# The table


def show(result: Mapping[str, Any]) -> None:
    """Prints the result for people, on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    machine, model = result["machine"], result["model"]
    console.print(
        f"{model['parameters']:,} parameters, {model['rows']} x {model['context']} tokens a step, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}",
        markup=False,
    )
    for title, table in tables(result):
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(table)


TITLES = {
    "ours": "ours, AdamW",
    "ours_muon": "ours, Muon",  # where the recipe asks for it
    "transformers_fp32": "Transformers, fp32 eager",
    "transformers_bf16": "Transformers, bf16 autocast",
    "transformers_bf16_compiled": "Transformers, bf16 compiled",
}


def tables(result: Mapping[str, Any]) -> "Iterator[tuple[str, Table]]":
    """Title and table of each measurement that was made."""
    if "matmul" in result:
        found = result["matmul"]
        rows = [[name, f"{found[name]['gflops']:,.0f}", _shape(found[name]["shape"])] for name in found]
        yield "Matrix products", _table(["precision", "GFLOP/s", "fastest shape"], rows)
    if "train" in result:
        found = result["train"]
        rows = []
        for name, one in found["candidates"].items():
            times = f"{one['ours_times_as_fast']:.2f}" if "ours_times_as_fast" in one else ""
            rows.append([TITLES[name], f"{one['tokens_per_second']:,.0f}", times, f"{one['share_of_peak']:.0%}"])
        headings = ["step", "tokens/s", "ours is x times", f"of {found['precision']} peak"]
        yield "Training: the same weights, rows of one document, fused AdamW", _table(headings, rows)
    if "decode" in result:
        found = result["decode"]
        rows = []
        for batch, one in found["batch"].items():
            for name, mark in (("ours", ""), ("ours_compiled", ", compiled")):
                if name in one:
                    same = one[f"{name}_same_prompts"]
                    speeds = [f"{one[name]:,.0f}", f"{one['transformers']:,.0f}", f"{one[f'{name}_times_as_fast']:.2f}"]
                    rows.append([batch + mark, *speeds, "yes" if str(same) == batch else f"of {same} in {batch}"])
        headings = ["batch", "ours", "Transformers", "ours is x times", "same tokens"]
        title = (
            f"Decoding, tokens/s: greedy, {found['dtype']}, {found['prompt_tokens']} tokens read, {found['new_tokens']} made"
        )
        yield title, _table(headings, rows)
    if "memory" in result:
        found = result["memory"]
        mebibytes = [f"{found[name] / 2**20:,.0f} MiB" for name in ("ours", "transformers_fp32")]
        headings = ["ours", "Transformers, fp32 eager", "share"]
        yield f"Peak memory of a step: {found['what']}", _table(headings, [[*mebibytes, f"{found['share']:.0%}"]])
    if "machinery" in result:
        found = result["machinery"]
        headings = ["data", "tracking", "checkpoints", "together"]
        title = f"Machinery, at most so much of step time (tracker: {found['tracker']}; rows: {found['rows']})"
        yield title, _table(headings, [[f"{found[name]:.2%}" for name in ("data", "tracking", "checkpoints", "total")]])
    if PROCESSES in result:
        found = result[PROCESSES]
        names = {"one": "1 process", "ddp": "2 processes, ddp", "fsdp": "2 processes, fsdp"}
        rows = [
            [names[name], f"{one['tokens_per_second']:,.0f}", f"{one['share_of_one']:.2f}"]
            for name, one in found["candidates"].items()
        ]
        title = f"Processes: the same step on {found['threads']} CPU threads, over gloo"
        yield title, _table(["training", "tokens/s", "of one process"], rows)
    if LORA in result:
        yield from _adapting_tables(result[LORA])
    if LEARNING in result:
        found = result[LEARNING]
        names = {"ours": "ours, as the recipe trains", "plain": "Transformers, AdamW at 3e-3"}
        rows = [
            [names[name], f"{one['steps']:,}", f"{one['seconds']:,.0f}", f"{one['bits_per_byte']:.3f}"]
            for name, one in found.items()
            if name in names
        ]
        title = (
            f"Learning: held-out text after {found['seconds_wanted']:,.0f} s; ours is {found['bits_per_byte_below']:.3f} below"
        )
        yield title, _table(["training", "steps", "seconds", "bits per byte"], rows)


def _adapting_tables(found: Mapping[str, Any]) -> "Iterator[tuple[str, Table]]":
    titles = {"full": "all weights", "lora": f"LoRA, r = {found['r']}", "qlora": f"QLoRA, r = {found['r']}"}
    rows = [
        [
            titles[name],
            f"{one['trained_parameters']:,}",
            f"{one['trained_share']:.2%}",
            f"{one['seconds_per_step']:.3f} s",
            f"{one['time_of_full']:.2f}",
            f"{one['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{one['memory_of_full']:.2f}",
        ]
        for name, one in found["ways"].items()
    ]
    headings = ["what learns", "weights", "share", "step", "of full", "peak memory", "of full"]
    yield "Fine-tuning: the same model and step", _table(headings, rows)
    if "base" in found:
        base = found["base"]
        row = [*(f"{base[name] / 2**20:,.0f} MiB" for name in ("nf4_bytes", "bf16_bytes")), f"{base['nf4_of_bf16']:.3f}"]
        yield "Weights of the base", _table(["nf4", "bf16", "nf4 of bf16"], [row])


def _table(headings: list[str], rows: list[list[str]]) -> "Table":
    from rich.table import Table

    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _shape(shape: list[int]) -> str:
    rows, inner, columns = shape
    return f"{rows}x{inner} @ {inner}x{columns}"
