"""`run prove-resume`: whether a training, killed and run again, ends bit for bit where one ends that was left alone.

The stage is trained for a few steps by the same workers as in a run, in a folder of its own: once undisturbed; once until its
processes are killed (SIGKILL) some steps behind a checkpoint, and on from there. What `runner.diagnostics.resume_diff` finds in both is
compared. A proof is kept beside the records, as `proofs/<key>.json` under the key of the stage, and is no part of them.
"""

import contextlib
import datetime
import fcntl
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
from runner.cache.record import Record
from runner.cache.store import Store, Waiting
from runner.credentials import redact
from runner.diagnostics.resume_diff import Remains, compare
from runner.errors import RecipeError, StageError
from runner.execution import launch
from runner.execution.job import ERROR, JOB, RESULT, Job
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
PARTS = 4  # checkpoints in as many steps
TRIES = 3  # at killing a training that may be over before the kill comes
POLL_SECONDS = 0.001


def prove(recipe: Recipe, store: Store, name: str, *, steps: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Trains, kills, trains on and compares; returns the verdict as JSON, after keeping it in the cache.

    `steps` is rounded up to a multiple of PARTS. Raises RecipeError for a stage that does not train, StageError where what it
    reads is not finished or a training fails.
    """
    plan = Plan(recipe, store, until=name)
    entry = plan.entries[name]
    if not isinstance(entry.stage, TrainingStage):
        raise RecipeError(f"stage {name!r}: is of kind {entry.stage.kind!r}; expected one that trains")
    missing = [source for source in plan.inputs(name) if plan.entries[source].path is None]
    if missing or entry.key is None:
        raise StageError(
            f"stage {name!r}: expected {', '.join(missing)} finished; `run {recipe.path} --until {missing[-1]}` does it"
        )
    steps = -(-steps // PARTS) * PARTS
    sources = {source: plan.record(source) for source in plan.inputs(name)}
    with _folder(store, entry.key) as (folder, log), store.reading(sources.values(), waiting=Waiting()):
        for source, record in sources.items():
            if not store.has_artifact(record, reread=True):
                raise StageError(
                    f"stage {source!r}: its artifact does not match its record; running the recipe makes it again"
                )
        processes, cores = resources.process_count(recipe.head.parallel), available_cores()
        first = _first_step(entry.stage, sources)
        every = steps // PARTS
        end = -(-(first + steps) // every) * every
        short = replace(entry, stage=_shortened(entry.stage, end, every=every), beginning=None)
        job = job_of(short, plan, recipe, store, work=folder, processes=processes, cores=cores)
        job = replace(job, parallel=plain(_as_it_trained(recipe.head.parallel, entry)))
        training = _Training(name, job, folder, log, compiled=store.compiled)
        tell(f"{name}: trains {steps} steps undisturbed")
        whole = training.begin("whole")
        if type(entry.stage).prepare is not Stage.prepare:
            training.prepare(whole)
        prepared = shutil.copytree(whole.work, folder / "prepared")
        training.run(whole)
        tell(f"{name}: trains them again, until it is killed")
        parts = training.run_until_killed(prepared, steps=end)
        killed, before = max(line.step for line in parts.rows()) + 1, parts.processes()
        tell(f"{name}: was killed in step {killed + 1}, and goes on")
        training.run(parts)
        checks = compare(whole, parts, entry.stage, steps=range(first, end))
        result = json.loads((parts.scratch / RESULT).read_text(encoding="utf-8"))
        continued = min(line.step for line in parts.rows() if line.process not in before)
    proof = {
        "kind": entry.stage.kind,
        "key": entry.key,
        "stage": name,
        "recipe": recipe.head.name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": code_digest(type(entry.stage)),
        "equal": not any(check.different for check in checks),
        "steps": end,
        "killed_after_step": killed,
        "continued_after_step": continued,
        "choices": result["metrics"]["choices"],
        "checks": [asdict(check) for check in checks],
    }
    write_whole(_place(store, entry.key), json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    return proof


def proof_of(store: Store, key: str) -> dict[str, Any] | None:
    """The last proof that was made of the training with this key."""
    try:
        proof: dict[str, Any] = json.loads(_place(store, key).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return proof


def sentence(proof: Mapping[str, Any]) -> str:
    """The verdict in a line."""
    different = [check["name"] for check in proof["checks"] if check["different"]]
    choices = proof["choices"]
    processes = f"{choices['processes']} process{'es' if choices['processes'] > 1 else ''}"
    how = f"{processes}, {'compiled' if choices['compiled'] else 'eager'}, {choices['precision']}"
    when = f"killed after step {proof['killed_after_step']} of {proof['steps']}, went on after {proof['continued_after_step']}"
    verdict = f"ended with other {', '.join(different)}" if different else "ended bit for bit as if undisturbed"
    return f"{when}, {verdict} ({how})"


def _place(store: Store, key: str) -> Path:
    return store.root / PROOFS / f"{key}.json"


@contextlib.contextmanager
def _folder(store: Store, key: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """An empty folder of this proof's own, and the log of its workers, which is also the lock on it."""
    folder = store.root / PROOFS / f"{key}.work"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{log.name}: another process is proving the same; wait for it") from None
        shutil.rmtree(folder, ignore_errors=True)  # of a proof that was ended
        folder.mkdir()
        try:
            yield folder, log
        finally:
            shutil.rmtree(folder)


def _first_step(stage: TrainingStage, sources: Mapping[str, Record]) -> int:
    """The step at which a training begins: the end of its trunk, if it goes on from one."""
    return int(sources[stage.trunk].data["metrics"]["steps"]) if isinstance(stage, Pretrain) and stage.trunk else 0


def _shortened(stage: TrainingStage, end: int, *, every: int) -> TrainingStage:
    """The same training up to an early `end`, with a look at held-out text and a checkpoint after each of a few steps."""
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
    """[parallel], where what is "auto" is what the finished stage found, which in so few steps might be something else."""
    if entry.record is None:
        return parallel
    choices = entry.record.data["metrics"]["choices"]
    found = {"precision": choices["precision"], "compile": choices["compiled"]}
    found["fused_attention"] = choices.get("fused_attention", False)  # which older records lack
    return parallel.model_copy(update={name: value for name, value in found.items() if getattr(parallel, name) == "auto"})


class _Training:
    """Runs the workers of one training in folders of its own."""

    def __init__(self, name: str, job: Job, folder: Path, log: IO[bytes], *, compiled: Path) -> None:
        self._name, self._job, self._folder, self._log, self._compiled = name, job, folder, log, compiled

    def begin(self, name: str, *, prepared: Path | None = None) -> Remains:
        """A folder for a training, new, or a copy of one in which it was prepared."""
        remains = Remains(self._folder / name, self._folder / f"{name}-rows")
        for folder in (remains.work, remains.row_logs):
            shutil.rmtree(folder, ignore_errors=True)
        if prepared is not None:
            shutil.copytree(prepared, remains.work)
        remains.scratch.mkdir(parents=True, exist_ok=True)
        remains.row_logs.mkdir()
        replace(self._job, work=str(remains.work), row_logs=str(remains.row_logs)).write(remains.scratch / JOB)
        return remains

    def prepare(self, remains: Remains) -> None:
        """What comes before a training group is formed."""
        command = launch.plain_command(remains.scratch / JOB, "--prepare")
        with self._launched(command, threads=self._job.cores) as process:
            self._end(process, remains)

    def run(self, remains: Remains) -> None:
        """The training, from where it is to its end; StageError if it fails."""
        with self._training(remains) as process:
            self._end(process, remains)

    def run_until_killed(self, prepared: Path, *, steps: int) -> Remains:
        """Begins a training and kills all of its processes once it has done a step behind a checkpoint."""
        for _ in range(TRIES):
            remains = self.begin("parts", prepared=prepared)
            with self._training(remains) as process:
                while process.poll() is None and not _is_behind_a_checkpoint(remains):
                    time.sleep(POLL_SECONDS)
                running = process.poll() is None
                for number in [*remains.processes(), process.pid] if running else []:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                code = process.wait()
            if not running and code != 0:
                self._fail(code, remains)
            if remains.checkpoints()[-1:] != [steps] and not (remains.scratch / RESULT).exists():
                return remains
        raise StageError(f"stage {self._name!r}: ended {TRIES} times before it could be killed; more --steps take longer")

    def _training(self, remains: Remains) -> contextlib.AbstractContextManager[launch.Process]:
        processes = self._job.processes
        command = launch.training_command(remains.scratch / JOB, processes)
        return self._launched(command, threads=max(1, self._job.cores // processes))

    def _launched(self, command: list[str], *, threads: int) -> contextlib.AbstractContextManager[launch.Process]:
        return launch.started(command, log=self._log, environment=launch.environment_of(threads, compiled=self._compiled))

    def _end(self, process: launch.Process, remains: Remains) -> None:
        if (code := process.wait()) != 0:
            self._fail(code, remains)

    def _fail(self, code: int, remains: Remains) -> None:
        error = remains.scratch / ERROR
        said = json.loads(error.read_text(encoding="utf-8"))["message"] if error.exists() else f"ended with exit code {code}"
        raise StageError(f"stage {self._name!r}: {redact(said)}\n(log: {self._log.name})")


def _is_behind_a_checkpoint(remains: Remains) -> bool:
    checkpoints = remains.checkpoints()
    return bool(checkpoints) and max((line.step for line in remains.rows()), default=-1) >= checkpoints[-1]
