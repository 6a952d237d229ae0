"""`run prove-resume`: a training that is killed and resumed must end bit for bit like an uninterrupted one.

The stage is trained for a few steps by the same workers as in a run, in a folder of its own: once without interruption, and
once until its processes are killed (SIGKILL) some steps after a checkpoint, and on from there. The outputs are compared by
`runner.diagnostics.resume_diff`. The result is kept in the cache, in `proofs/<key>.json` under the key of the stage.
"""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from llm.training.config import Budget
from runner import resources
from runner.artifacts import ERROR
from runner.cache.record import Record
from runner.cache.store import Store, Waiting
from runner.credentials import redact
from runner.diagnostics.resume_diff import TrainingOutput, compare
from runner.engine import launch
from runner.engine.interface import Fork
from runner.engine.job import JOB, RESULT, Job
from runner.errors import RecipeError, StageError
from runner.execution.fork_server import fork_server
from runner.execution.stage_run import job_of
from runner.files import write_whole
from runner.graph import plain
from runner.planning.code_digest import code_digest
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores
from runner.stage import Parallel, Stage
from runner.stages.fields.training import TrainingStage
from runner.stages.pretrain import Pretrain

PROOFS = "proofs"  # in the cache
PARTS = 4  # checkpoints of a proof
TRIES = 3  # at killing a training before it ends
POLL_SECONDS = 0.001


def prove(recipe: Recipe, store: Store, name: str, *, steps: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Trains, kills, resumes and compares; returns the proof as JSON, after saving it in the cache.

    `steps` is rounded up to a multiple of PARTS. Raises RecipeError for a stage that does not train, and StageError if an
    input is not finished or a training fails.
    """
    plan = Plan(recipe, store, until=name)
    entry = plan.entries[name]
    if not isinstance(entry.stage, TrainingStage):
        raise RecipeError(f"stage {name!r}: expected a stage that trains, but its kind is {entry.stage.kind!r}")
    missing = [source for source in plan.inputs(name) if plan.entries[source].path is None]
    if missing or entry.key is None:
        raise StageError(
            f"stage {name!r}: expected {', '.join(missing)} finished; `run {recipe.path} --until {missing[-1]}` does it"
        )
    sources = {source: plan.record(source) for source in plan.inputs(name)}
    with _folder(store, entry.key) as (folder, log), store.reading(sources.values(), waiting=Waiting()):
        for source, record in sources.items():
            if not store.has_artifact(record, reread=True):
                raise StageError(f"stage {source!r}: its artifact does not match its record; run the recipe to rebuild it")
        first, every = _first_step(entry.stage, sources), -(-steps // PARTS)
        end = -(-(first + PARTS * every) // every) * every
        short = replace(entry, stage=_shortened(entry.stage, end, every=every), beginning=None)
        processes, cores = resources.process_count(recipe.head.parallel), available_cores()
        job = job_of(short, plan, recipe, store, work=folder, processes=processes, cores=cores)
        job = replace(job, parallel=plain(_as_it_trained(recipe.head.parallel, entry)))
        server = fork_server(entry.stage.imports, place=folder) if processes == 1 else None
        with contextlib.closing(server) if server else contextlib.nullcontext():
            fork = functools.partial(server.start, entry.stage.imports) if server else None
            result = _kill_and_compare(_Training(name, job, folder, log, fork), entry.stage, range(first, end), tell)
    proof = {
        "kind": entry.stage.kind,
        "key": entry.key,
        "stage": name,
        "recipe": recipe.head.name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": code_digest(type(entry.stage)),
        **result,
    }
    write_whole(_proof_path(store, entry.key), json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    return proof


def _kill_and_compare(
    training: "_Training", stage: TrainingStage, steps: range, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Trains `steps` without interruption and with one, and compares the outputs."""
    name = training.name
    tell(f"{name}: trains up to step {steps.stop} without interruption")
    whole = training.begin("whole")
    if type(stage).prepare is not Stage.prepare:
        training.prepare(whole)
    prepared = shutil.copytree(whole.work, training.folder / "prepared")
    training.run(whole)
    tell(f"{name}: trains again, to be killed")
    resumed = training.run_until_killed(prepared, steps=steps.stop)
    killed, before = max(step.step for step in resumed.steps()) + 1, resumed.processes()
    tell(f"{name}: was killed in step {killed + 1} and resumes")
    training.run(resumed)
    checks = compare(whole, resumed, stage, steps=steps)
    result = json.loads((resumed.scratch / RESULT).read_text(encoding="utf-8"))
    return {
        "equal": not any(check.different for check in checks),
        "steps": steps.stop,
        "killed_after_step": killed,
        "continued_after_step": min(step.step for step in resumed.steps() if step.process not in before),
        "choices": result["metrics"]["choices"],
        "checks": [asdict(check) for check in checks],
    }


def proof_of(store: Store, key: str) -> dict[str, Any] | None:
    """The last proof for the training with this key; None without one."""
    try:
        proof: dict[str, Any] = json.loads(_proof_path(store, key).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return proof


def sentence(proof: Mapping[str, Any]) -> str:
    """The result in one line."""
    different = [check["name"] for check in proof["checks"] if check["different"]]
    choices = proof["choices"]
    processes = f"{choices['processes']} process{'es' if choices['processes'] > 1 else ''}"
    how = f"{processes}, {'compiled' if choices['compiled'] else 'eager'}, {choices['precision']}"
    when = f"killed after step {proof['killed_after_step']} of {proof['steps']}, resumed after {proof['continued_after_step']}"
    verdict = f"differs in {', '.join(different)}" if different else "ended bit for bit like an uninterrupted training"
    return f"{when}, {verdict} ({how})"


def _proof_path(store: Store, key: str) -> Path:
    return store.root / PROOFS / f"{key}.json"


@contextlib.contextmanager
def _folder(store: Store, key: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """An empty folder for one proof, and the log of its workers, which is also its lock."""
    folder = store.root / PROOFS / f"{key}.work"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{log.name}: another process proves the same stage; wait for it") from None
        shutil.rmtree(folder, ignore_errors=True)  # of a proof that was killed
        folder.mkdir()
        try:
            yield folder, log
        finally:
            shutil.rmtree(folder)


def _first_step(stage: TrainingStage, sources: Mapping[str, Record]) -> int:
    """The step at which a training starts: the last of its trunk, if it has one."""
    return int(sources[stage.trunk].data["metrics"]["steps"]) if isinstance(stage, Pretrain) and stage.trunk else 0


def _shortened(stage: TrainingStage, end: int, *, every: int) -> TrainingStage:
    """The same training up to step `end`, with a validation and a checkpoint every few steps."""
    return stage.model_copy(
        update={
            "budget": Budget(steps=end),
            "checkpoint_every": every,
            "checkpoint_minutes": None,
            "validate_every": every,
            "validation_tokens": min(stage.validation_tokens, stage.batch_tokens),
        }
    )


def _as_it_trained(parallel: Parallel, entry: Entry) -> Parallel:
    """[parallel] with each "auto" as the finished stage resolved it, since a short training might resolve it differently."""
    if entry.record is None:
        return parallel
    choices = entry.record.data["metrics"]["choices"]
    resolved = {
        "precision": choices["precision"],
        "compile": choices["compiled"],
        "fused_attention": choices["fused_attention"],
    }
    return parallel.model_copy(update={name: value for name, value in resolved.items() if getattr(parallel, name) == "auto"})


class _Training:
    """Runs the workers of one training in folders below `folder`."""

    def __init__(self, name: str, job: Job, folder: Path, log: IO[bytes], fork: Fork | None = None) -> None:
        self.name, self.folder = name, folder
        self._job, self._log, self._fork = job, log, fork  # `fork` starts a single worker

    def begin(self, name: str, *, prepared: Path | None = None) -> TrainingOutput:
        """The folder for a training, empty or a copy of `prepared`."""
        output = TrainingOutput(self.folder / name, self.folder / f"{name}-rows")
        for folder in (output.work, output.row_logs):
            shutil.rmtree(folder, ignore_errors=True)
        if prepared is not None:
            shutil.copytree(prepared, output.work)
        output.scratch.mkdir(parents=True, exist_ok=True)
        output.row_logs.mkdir()
        replace(self._job, work=str(output.work), row_logs=str(output.row_logs)).write(output.scratch / JOB)
        return output

    def prepare(self, output: TrainingOutput) -> None:
        """Runs the preparation of the stage, before its process group exists."""
        self.run(output, launch.plain_command(output.scratch / JOB, "--prepare"))

    def run(self, output: TrainingOutput, command: list[str] | None = None) -> None:
        """Runs `command`, by default the training from the last checkpoint to the end; StageError if it fails."""
        with self._launched(output, command) as process:
            self._check(process.wait(), output)

    def run_until_killed(self, prepared: Path, *, steps: int) -> TrainingOutput:
        """Starts a training and kills all of its processes once a step after a checkpoint is done."""
        for _ in range(TRIES):
            output = self.begin("resumed", prepared=prepared)
            with self._launched(output) as process:
                while process.poll() is None and not _is_past_a_checkpoint(output):
                    time.sleep(POLL_SECONDS)
                running = process.poll() is None
                for number in [*output.processes(), process.pid] if running else []:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                code = process.wait()
            if not running:
                self._check(code, output)
            if output.checkpoints()[-1:] != [steps] and not (output.scratch / RESULT).exists():
                return output
        raise StageError(f"stage {self.name!r}: ended {TRIES} times before it could be killed; pass more --steps")

    def _launched(
        self, output: TrainingOutput, command: list[str] | None = None
    ) -> contextlib.AbstractContextManager[launch.LocalProcess]:
        processes = 1 if command else self._job.processes
        threads = max(1, available_cores() // processes)
        command = command or launch.group_command(output.scratch / JOB, processes)
        return launch.started(command, log=self._log, environment=launch.environment_of(threads), fork=self._fork)

    def _check(self, code: int, output: TrainingOutput) -> None:
        if code == 0:
            return
        error = output.scratch / ERROR
        message = json.loads(error.read_bytes())["message"] if error.exists() else f"ended with exit code {code}"
        raise StageError(f"stage {self.name!r}: {redact(message)}\n(log: {self._log.name})")


def _is_past_a_checkpoint(output: TrainingOutput) -> bool:
    checkpoints = output.checkpoints()
    return bool(checkpoints) and max((step.step for step in output.steps()), default=-1) >= checkpoints[-1]
