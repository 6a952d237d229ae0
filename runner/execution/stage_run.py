"""Runs one stage, from job file to result: launches its processes, follows them, explains their failures and retries."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import tomli_w

from runner.artifacts import ERROR, METRICS, PAUSED, SCRATCH
from runner.cache.store import Store
from runner.credentials import redact
from runner.engine import launch
from runner.engine.interface import REFUSAL, REFUSED, Engine, Fork, Gang, Wish
from runner.engine.job import JOB, PREPARED, RESULT, STOP, Job
from runner.errors import PausedError, StageError
from runner.execution.notifications import Notifier
from runner.execution.retry_policy import RetryPolicy
from runner.execution.stop import StopRequest
from runner.execution.watchdog import Watchdog
from runner.graph import input_files, plain
from runner.planning.code_digest import code_digest
from runner.planning.outcomes import sweep_rows
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView, duration
from runner.resources import available_cores, process_count
from runner.stage import Stage
from runner.tracking.metrics_file import MetricsReader
from runner.tracking.tracker_process import TrackerProcess

ENDING_SECONDS = 5.0  # for the other nodes to end after the processes of one failed; torch's launcher waits for 300
FULL_BYTES = 2**20  # with less free space, a worker may fail without an error message
LOG_BYTES = 1 << 16  # at the end of a log, of which the last lines are shown
PATIENCE_SECONDS = 3.0  # until the user is told what a stage waits for
LOG_LINES = 12  # shown of a worker that died without an error message


class StageRun:
    """One stage run, under the lock of its key."""

    def __init__(
        self,
        entry: Entry,
        plan: Plan,
        recipe: Recipe,
        store: Store,
        log: IO[bytes],
        *,
        engine: Engine,
        fork: Fork | None = None,  # starts a single worker
    ) -> None:
        self._entry, self._plan, self._recipe, self._store, self._log = entry, plan, recipe, store, log
        self._engine, self._fork = engine, fork
        self._work = store.work(entry.stage, str(entry.key))
        self._scratch = self._work / SCRATCH
        self._cores = available_cores()

    def run(self, progress: RunView, stop: StopRequest, tracker: TrackerProcess, notifier: Notifier) -> dict[str, Any]:
        """Launches the stage's processes and waits for them; returns the result of the workers.

        A training is retried after machine faults, as [parallel] says. Raises StageError, or PausedError for an alert.
        """
        stage, parallel = self._entry.stage, self._recipe.head.parallel
        self._relay = _MetricsRelay(MetricsReader(self._work / METRICS), progress, notifier, self._entry.name)
        self._note = progress.note
        if stage.trains:
            tracker.follow(self._relay.reader, self._store.folder(stage, str(self._entry.key)) / METRICS, self._facts())
        self._prepare(stop)
        per_node = process_count(parallel, gpus=self._engine.gpus_per_node())
        if not stage.trains:
            processes = per_node if stage.in_processes else 1
            return self._launch_group(processes, 1, stop)
        policy = RetryPolicy(self._scratch, parallel, processes=per_node * parallel.nodes)
        again = False
        while True:
            nodes = parallel.nodes if policy.processes > 1 else 1
            watchdog = Watchdog(self._scratch, minutes=parallel.stall_minutes)
            try:
                facts = self._launch_group(policy.processes, nodes, stop, watchdog=watchdog, again=again)
            except MachineError as fault:
                then = policy.after_fault(fault.cause, step=self._relay.step)
                if then is None:
                    raise
                text = f"{self._entry.name}: {fault.cause}; it {then}"
                progress.note(text)
                notifier.send(text)
                again = True
            else:
                return facts | ({"faults": policy.faults} if policy.faults else {})

    def _prepare(self, stop: StopRequest) -> None:
        """Removes leftovers of an earlier run and runs `Stage.prepare`, before a training group forms."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        for name in (STOP, PAUSED):
            (self._scratch / name).unlink(missing_ok=True)
        if type(self._entry.stage).prepare is not Stage.prepare and not (self._scratch / PREPARED).exists():
            self._launch(Wish(self._job(1, 1), threads=self._cores, arguments=("--prepare",)), stop)
            (self._scratch / PREPARED).touch()

    def _launch_group(
        self,
        processes: int,  # on all nodes
        nodes: int,
        stop: StopRequest,
        *,
        watchdog: Watchdog | None = None,
        again: bool = False,
    ) -> dict[str, Any]:
        """Runs the processes of a stage to their end; returns what the record says of them and their result."""
        stage, per_node = self._entry.stage, processes // nodes
        wish = Wish(
            self._job(processes, nodes),
            nodes,
            per_node,
            threads=max(1, self._cores // per_node),
            gpus=stage.trains or stage.in_processes,
        )
        facts = self._launch(wish, stop, watchdog=watchdog, again=again)
        return {"processes": processes, **facts, **self._result()}

    def _result(self) -> dict[str, Any]:
        return dict(json.loads((self._scratch / RESULT).read_text(encoding="utf-8")))

    def _launch(
        self, wish: Wish, stop: StopRequest, *, watchdog: Watchdog | None = None, again: bool = False
    ) -> dict[str, Any]:
        """Runs processes to their end; returns what the record says of their places. Raises MachineError where a retry may
        help, KeyboardInterrupt after a request to stop.
        """
        log_start = os.fstat(self._log.fileno()).st_size
        for name in (RESULT, ERROR):
            (self._scratch / name).unlink(missing_ok=True)
        gang = self._engine.start(replace(wish, code=code_digest(type(self._entry.stage))), log=self._log, fork=self._fork)
        minutes = self._recipe.head.parallel.rejoin_minutes if again and wish.nodes > 1 else None
        queue = _Queue(self._entry.name, self._note, minutes=minutes)
        failed: list[float] = []  # when the processes of a node were seen to have failed

        def check() -> None:
            self._store.raise_if_lost(self._entry.stage, str(self._entry.key))
            if stop.requested:
                (self._scratch / STOP).touch()
            self._relay.forward()
            if queue.waits(gang):
                return
            if wish.nodes > 1 and (self._scratch / ERROR).exists():
                failed.append(time.monotonic())
                if failed[-1] - failed[0] > ENDING_SECONDS:
                    raise self._failure(None, log_start)
            if lost := gang.fault():
                raise MachineError(self._entry.name, lost, f"(log: {self._log.name})")
            if watchdog and watchdog.is_too_quiet():
                gang.show_stacks()
                raise MachineError(
                    self._entry.name,
                    f"a step has not ended for {duration(watchdog.quiet)}, so its processes are killed",
                    f"(their stacks are at the end of {self._log.name})",
                )

        try:
            code = launch.wait(gang, tick=check, stopping=lambda: stop.requested, at_once=lambda: gang.waits_for() is not None)
            facts, lost = gang.facts(), gang.fault()
        finally:
            gang.end()
        self._relay.forward()
        if code == 0:
            return facts
        if (self._scratch / PAUSED).exists():
            message = json.loads((self._scratch / PAUSED).read_text(encoding="utf-8"))["message"]
            raise PausedError(f"stage {self._entry.name!r}: {message}; run the same command to continue")
        if not (self._scratch / ERROR).exists():
            stop.raise_if_requested()
        if lost:
            raise MachineError(self._entry.name, lost, f"(log: {self._log.name})")
        raise self._failure(code, log_start)

    def _failure(self, code: int | None, log_start: int) -> StageError:
        """Why the workers failed: their own error message, else how they died and the end of their log."""
        log, name = Path(self._log.name), self._entry.name
        with log.open("rb") as file:
            file.seek(max(log_start, os.fstat(file.fileno()).st_size - LOG_BYTES))
            last = file.read().decode(errors="replace").splitlines()
        if code == REFUSED and (refusal := next((line for line in last if line.startswith(REFUSAL)), None)):
            return StageError(f"stage {name!r}: {refusal.removeprefix(REFUSAL)}")
        number = -code if code is not None and code < 0 else _signal_in("\n".join(last))
        if (self._scratch / ERROR).exists():
            error = json.loads((self._scratch / ERROR).read_text(encoding="utf-8"))
            message = redact(error["message"])
            if not error["again"]:
                return StageError(f"stage {name!r}: {message}\n(log: {log})")
            if not number:
                return MachineError(name, message, f"(log: {log})")
        died = f"was killed by signal {number}" if number else f"ended with exit code {code}"
        hint = " (perhaps out of memory)" if number == signal.SIGKILL else ""
        if shutil.disk_usage(self._work).free < FULL_BYTES:
            hint = " (the disk of the cache is full)"
        end = [f"Finished work is kept; the end of {log}:", *map(redact, last[-LOG_LINES:])]
        return MachineError(name, f"its worker {died}{hint}", "\n".join(end))

    def _job(self, processes: int, nodes: int) -> Path:
        """Writes the job file; returns its path."""
        path = self._scratch / JOB
        cores = self._cores if self._engine.kind == "local" else None
        job = job_of(self._entry, self._plan, self._recipe, self._store, work=self._work, processes=processes, cores=cores)
        replace(job, nodes=nodes).write(path)
        return path

    def _facts(self) -> dict[str, Any]:
        """The facts of a stage for the trackers."""
        name, stage, key = self._entry.name, self._entry.stage, self._entry.key
        return {"recipe": self._recipe.head.name, "stage": name, "kind": stage.kind, "key": key, "hparams": plain(stage)}


class MachineError(StageError):
    """A machine fault, after which a retry may help."""

    def __init__(self, stage: str, cause: str, details: str) -> None:
        super().__init__(f"stage {stage!r}: {cause}. {details}")
        self.cause, self.details = cause, details


class _Queue:
    """Tells once why the processes of a stage have not started, and gives up a retry that waits for too long."""

    def __init__(self, name: str, note: Callable[[str], None], *, minutes: float | None) -> None:
        self._name, self._note, self._minutes = name, note, minutes
        self._begun = time.monotonic()
        self._reason = ""
        self._is_over = False

    def waits(self, gang: Gang) -> bool:
        """Whether they still wait; MachineError once a retry has waited for `minutes`."""
        reason = None if self._is_over else gang.waits_for()
        now = time.monotonic()
        if reason is None:
            self._is_over = True
            return False
        if reason and reason != self._reason and now - self._begun > PATIENCE_SECONDS:
            self._note(f"{self._name}: waits for {reason}")
            self._reason = reason
        if self._minutes is not None and now - self._begun > 60 * self._minutes:
            raise MachineError(self._name, f"its nodes did not start within {duration(60 * self._minutes)}: {reason}", "")
        return True


class _MetricsRelay:
    """Passes the metrics of a running stage to the progress view and its alerts to the notifier."""

    def __init__(self, reader: MetricsReader, progress: RunView, notifier: Notifier | None, name: str) -> None:
        self.reader, self._progress, self._notifier, self._name = reader, progress, notifier, name
        self.step = 0  # the highest reported

    def forward(self) -> None:
        """Passes on new lines."""
        for line in self.reader.new_lines():
            self._progress.reported(line)
            self.step = max(self.step, int(line.get("step", 0)))
            if "alert" in line and self._notifier:
                self._notifier.send(f"{self._name}: {line['action']}: {line.get('note') or line.get('text')}")


def job_of(entry: Entry, plan: Plan, recipe: Recipe, store: Store, *, work: Path, processes: int, cores: int | None) -> Job:
    """The job of a stage in the folder `work`; it names stages as the recipe does."""
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
        recipe=tomli_w.dumps(recipe.published(plan.selected)),
        parallel=plain(recipe.head.parallel),
        processes=processes,
        cores=cores,
        data={other: named for other, named in data.items() if named},
        settings=_settings_behind(plan, name),
        beginning=str(store.folder(entry.beginning.kind, entry.beginning.key)) if entry.beginning else None,
    )


def _settings_behind(plan: Plan, name: str) -> list[list[str]]:
    """The settings of the sweep whose best one a stage reads, as a table."""
    sweep = plan.recipe.sweep
    if sweep is None or plan.decided[sweep.stage] is None or plan.family_of(name) is sweep:
        return []
    return sweep_rows(plan, sweep) if plan.above(name) & {*sweep.all_judges} else []


def _signal_in(log: str) -> int | None:
    """The signal that ended a worker, from the log of accelerate or torch's launcher."""
    if match := re.search(r"died with <Signals\.(SIG\w+)", log):
        return int(signal.Signals[match[1]])
    match = re.search(r"exitcode\s*: -(\d+)", log)
    return int(match[1]) if match else None
