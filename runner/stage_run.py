"""The work of one stage, from job file to result: its processes are launched, followed and, where they fail,
explained and launched again.
"""

import json
import os
import re
import signal
from pathlib import Path
from typing import IO, Any

import tomli_w

from runner import launch, living
from runner.alerts import Notices
from runner.artifacts import METRICS, SCRATCH
from runner.attempts import Attempts
from runner.errors import PausedError, StageError
from runner.graph import input_files, plain
from runner.job import ERROR, JOB, PAUSED, PREPARED, RESULT, STOP, Job
from runner.plan import Entry, Plan
from runner.progress import Follower, Progress, duration
from runner.recipe import Recipe
from runner.secrets import redact
from runner.stage import Stage
from runner.store import Store
from runner.track import Tracker
from runner.watchdog import Watchdog

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

    def work(self, progress: Progress, stop: StopRequest, tracker: Tracker, notices: Notices) -> dict[str, Any]:
        """Launches the stage's processes and waits for them; returns what the workers left as result.

        A training begins again after faults, as [parallel] says. Raises StageError, or PausedError for an alert.
        """
        stage, parallel = self._entry.stage, self._recipe.head.parallel
        self._scratch.mkdir(parents=True, exist_ok=True)
        for name in (STOP, PAUSED):
            (self._scratch / name).unlink(missing_ok=True)
        job, cores = self._scratch / JOB, available_cores()
        processes = launch.process_count(parallel) if stage.trains else 1
        self._job(processes, cores).write(job)
        self._view = _View(Follower(self._work / METRICS), progress, notices, self._entry.name)
        if stage.trains:
            tracker.follow(self._view.metrics, self._store.folder(stage, str(self._entry.key)) / METRICS, self._facts())
        if type(stage).prepare is not Stage.prepare and not (self._scratch / PREPARED).exists():
            self._launch(launch.plain_command(job, "--prepare"), stop, threads=cores)
            (self._scratch / PREPARED).touch()
        if not stage.trains:
            self._launch(launch.plain_command(job), stop, threads=cores)
            return {"processes": 1, **self._result()}
        attempts = Attempts(self._scratch, parallel, processes=processes)
        while True:
            processes = attempts.processes
            self._job(processes, cores).write(job)
            watchdog = Watchdog(self._scratch, minutes=parallel.stall_minutes)
            try:
                command = launch.training_command(job, processes)
                self._launch(command, stop, threads=max(1, cores // processes), watchdog=watchdog)
            except _MachineError as fault:
                then = attempts.after(fault.cause, step=self._view.step)
                if then is None:
                    raise
                text = f"{self._entry.name}: {fault.cause}; it {then}"
                progress.note(text)
                notices.send(text)
            else:
                faults = {"faults": attempts.faults} if attempts.faults else {}
                return {"processes": processes, **faults, **self._result()}

    def _result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self._scratch / RESULT).read_text(encoding="utf-8"))
        return result

    def _launch(self, command: list[str], stop: StopRequest, *, threads: int, watchdog: Watchdog | None = None) -> None:
        """Runs a command to its end. Raises _MachineError where trying again may help, KeyboardInterrupt if asked to stop."""
        log_start = os.fstat(self._log.fileno()).st_size
        for name in (RESULT, ERROR):
            (self._scratch / name).unlink(missing_ok=True)

        def tick() -> None:
            if stop.requested:
                (self._scratch / STOP).touch()
            self._view.look()
            if watchdog and watchdog.is_too_quiet():
                living.show_stacks(self._scratch)
                raise _MachineError(
                    self._entry.name,
                    f"a step has not ended for {duration(watchdog.quiet)}, so its processes are ended",
                    f"(where they were is at the end of {self._log.name})",
                )

        try:
            with launch.started(command, log=self._log, threads=threads, compiled=self._store.compiled) as process:
                code = launch.wait(process, tick=tick, stopping=lambda: stop.requested)
        finally:
            living.end(self._scratch)
        self._view.look()
        if code == 0:
            return
        if (self._scratch / PAUSED).exists():
            message = json.loads((self._scratch / PAUSED).read_text(encoding="utf-8"))["message"]
            raise PausedError(f"stage {self._entry.name!r}: {message}; the same command goes on from there")
        if stop.requested and not (self._scratch / ERROR).exists():
            raise KeyboardInterrupt
        raise self._failure(code, log_start)

    def _failure(self, code: int | None, log_start: int) -> StageError:
        """Why the workers failed: their own sentence, else how they died and the end of their log."""
        log, name = Path(self._log.name), self._entry.name
        with log.open("rb") as file:
            file.seek(log_start)
            last = file.read().decode(errors="replace").splitlines()
        number = -code if code is not None and code < 0 else _signal_in("\n".join(last))
        if (self._scratch / ERROR).exists():
            error = json.loads((self._scratch / ERROR).read_text(encoding="utf-8"))
            message = redact(error["message"])
            if not error["again"]:
                return StageError(f"stage {name!r}: {message}\n(log: {log})")
            if not number:
                return _MachineError(name, message, f"(log: {log})")
        died = f"was killed by signal {number}" if number else f"ended with exit code {code}"
        hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
        end = [f"What it had finished is kept; the end of {log}:", *map(redact, last[-LOG_LINES:])]
        return _MachineError(name, f"its worker {died}{hint}", "\n".join(end))

    def _job(self, processes: int, cores: int) -> Job:
        return job_of(self._entry, self._plan, self._recipe, self._store, work=self._work, processes=processes, cores=cores)

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


class _MachineError(StageError):
    """A fault of machines: what is lost is time, and beginning again may help."""

    def __init__(self, stage: str, cause: str, details: str) -> None:
        super().__init__(f"stage {stage!r}: {cause}. {details}")
        self.cause = cause


class _View:
    """What a running stage reports, on its way to whom it concerns."""

    def __init__(self, metrics: Follower, progress: Progress, notices: Notices, name: str) -> None:
        self.metrics, self._progress, self._notices, self._name = metrics, progress, notices, name
        self.step = 0  # the furthest that was reported

    def look(self) -> None:
        """Passes new lines on."""
        for line in self.metrics.new_lines():
            self._progress.reported(line)
            self.step = max(self.step, int(line.get("step", 0)))
            if "alert" in line:
                self._notices.send(f"{self._name}: {line['action']}: {line.get('note') or line.get('text')}")


def job_of(entry: Entry, plan: Plan, recipe: Recipe, store: Store, *, work: Path, processes: int, cores: int) -> Job:
    """What the workers of a stage that can run, in the folder `work`, have to know; stages by their names in the recipe."""
    name, folder = entry.name, recipe.path.parent.resolve()
    records = plan.sources_read(name)
    read = [other for other in plan if other.name == name or plan.written(other.name) in records]
    data = {plan.written(other.name): store.digests.named_contents(input_files(other.stage), folder) for other in read}
    return Job(
        name=name,
        kind=entry.stage.kind,
        fields=plain(entry.stage, ref=plan.written, file=lambda file: file.pattern),
        work=str(work),
        inputs={
            plan.written(source): str(store.folder(record.kind, record.key))
            for source in plan.inputs(name)
            for record in [plan.record(source)]
        },
        records={source: record.data for source, record in records.items()},
        recipe=tomli_w.dumps({key: value for key, value in recipe.resolved(plan.standing).items() if key != "cache"}),
        parallel=plain(recipe.head.parallel),
        processes=processes,
        cores=cores,
        data={other: named for other, named in data.items() if named},
    )


def _signal_in(log: str) -> int | None:
    """The signal that ended a worker, as accelerate and torch's launcher tell it at the end of their logs."""
    if found := re.search(r"died with <Signals\.(SIG\w+)", log):
        return int(signal.Signals[found[1]])
    found = re.search(r"exitcode\s*: -(\d+)", log)
    return int(found[1]) if found else None


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
