"""The work of one stage, from job file to result: its processes are launched, followed and, where they fail, explained."""

import json
import os
import re
import signal
from pathlib import Path
from typing import IO, Any

import tomli_w

from runner import launch
from runner.artifacts import METRICS, SCRATCH
from runner.errors import StageError
from runner.graph import plain
from runner.job import ERROR, JOB, PREPARED, RESULT, STOP, Job
from runner.plan import Entry, Plan
from runner.progress import Follower, Progress
from runner.recipe import Recipe
from runner.secrets import redact
from runner.stage import Stage
from runner.store import Store
from runner.track import Tracker

LOG_LINES = 12  # shown of a worker that died without a word


class StopRequest:
    """Whether the user asked the run to end. The first signal asks; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class StageRun:
    """The work of one stage, from job file to result, under its lock."""

    def __init__(self, entry: Entry, plan: Plan, recipe: Recipe, store: Store, log: IO[bytes]) -> None:
        self._entry, self._plan, self._recipe, self._store, self._log = entry, plan, recipe, store, log
        self._work = store.work(entry.stage, str(entry.key))
        self._scratch = self._work / SCRATCH

    def work(self, progress: Progress, stop: StopRequest, tracker: Tracker) -> dict[str, Any]:
        """Launches the stage's processes and waits for them; returns what the workers left as result."""
        stage = self._entry.stage
        self._scratch.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, ERROR, STOP):
            (self._scratch / name).unlink(missing_ok=True)
        job, cores = self._scratch / JOB, available_cores()
        processes = launch.process_count(self._recipe.head.parallel) if stage.trains else 1
        self._job(processes, cores).write(job)
        metrics = Follower(self._work / METRICS)
        if stage.trains:
            tracker.follow(metrics, self._store.folder(stage, str(self._entry.key)) / METRICS, self._facts())
        if type(stage).prepare is not Stage.prepare and not (self._scratch / PREPARED).exists():
            self._launch(launch.plain_command(job, "--prepare"), metrics, progress, stop, threads=cores)
            (self._scratch / PREPARED).touch()
        command = launch.training_command(job, processes) if stage.trains else launch.plain_command(job)
        self._launch(command, metrics, progress, stop, threads=max(1, cores // processes))
        result: dict[str, Any] = json.loads((self._scratch / RESULT).read_text(encoding="utf-8"))
        return {"processes": processes, **result}

    def _launch(self, command: list[str], metrics: Follower, progress: Progress, stop: StopRequest, *, threads: int) -> None:
        log_start = os.fstat(self._log.fileno()).st_size

        def tick() -> None:
            if stop.requested:
                (self._scratch / STOP).touch()
            for line in metrics.new_lines():
                progress.reported(line)

        with launch.started(command, log=self._log, threads=threads, compiled=self._store.compiled) as process:
            code = launch.wait(process, tick=tick, stopping=lambda: stop.requested)
        if code == 0:
            return
        if stop.requested and not (self._scratch / ERROR).exists():
            raise KeyboardInterrupt
        raise StageError(f"stage {self._entry.name!r}: {self._cause(code, log_start)}")

    def _cause(self, code: int | None, log_start: int) -> str:
        """Why the workers failed: their own sentence, else how they died and the end of their log."""
        log = Path(self._log.name)
        if (self._scratch / ERROR).exists():
            message = json.loads((self._scratch / ERROR).read_text(encoding="utf-8"))["message"]
            return f"{redact(message)}\n(log: {log})"
        with log.open("rb") as file:
            file.seek(log_start)
            last = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        number = -code if code is not None and code < 0 else _signal_in("\n".join(last))
        died = f"was killed by signal {number}" if number else f"ended with exit code {code}"
        hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
        return "\n".join([f"its worker {died}{hint}. What it had finished is kept; the end of {log}:", *map(redact, last)])

    def _job(self, processes: int, cores: int) -> Job:
        name, plan = self._entry.name, self._plan
        recipe = self._recipe.resolved(plan.standing)
        return Job(
            name=name,
            kind=self._entry.stage.kind,
            fields=plain(self._entry.stage, ref=plan.written, file=lambda file: file.pattern),
            work=str(self._work),
            inputs={
                plan.written(source): str(self._store.folder(record.kind, record.key))
                for source in plan.inputs(name)
                for record in [plan.record(source)]
            },
            records={source: record.data for source, record in plan.sources_read(name).items()},
            recipe=tomli_w.dumps({key: value for key, value in recipe.items() if key != "cache"}),
            parallel=plain(self._recipe.head.parallel),
            processes=processes,
            cores=cores,
        )

    def _facts(self) -> dict[str, Any]:
        """What the trackers show of a stage beside its curves."""
        entry = self._entry
        return {
            "recipe": self._recipe.head.name,
            "stage": entry.name,
            "kind": entry.stage.kind,
            "key": entry.key,
            "hparams": plain(entry.stage),
        }


def _signal_in(log: str) -> int | None:
    """The signal that ended a worker, as accelerate and torch's launcher tell it at the end of their logs."""
    if found := re.search(r"died with <Signals\.(SIG\w+)", log):
        return int(signal.Signals[found[1]])
    found = re.search(r"exitcode\s*: -(\d+)", log)
    return int(found[1]) if found else None


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
