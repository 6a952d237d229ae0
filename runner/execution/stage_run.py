"""Runs one stage, from job file to result: launches its processes, follows them, explains their failures and retries."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NoReturn

import tomli_w

from runner import resources
from runner.artifacts import ERROR, METRICS, PAUSED, SCRATCH
from runner.cache.store import Store
from runner.credentials import redact
from runner.errors import MachineLostError, PausedError, PeerFailedError, StageError
from runner.execution import launch, liveness
from runner.execution.fork_server import ForkedWorker
from runner.execution.job import JOB, PREPARED, RESULT, STOP, Job
from runner.execution.node_layout import ALONE, Layout
from runner.execution.notifications import Notifier
from runner.execution.peers import Peers
from runner.execution.retry_policy import RetryPolicy
from runner.execution.stop import StopRequest
from runner.execution.watchdog import Watchdog
from runner.graph import input_files, plain
from runner.planning.outcomes import sweep_rows
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView, duration
from runner.resources import available_cores
from runner.stage import Stage
from runner.tracking.metrics_file import MetricsReader
from runner.tracking.tracker_process import TrackerProcess

PEER_FAULT_SECONDS = 5.0  # for the processes here to end after those of another machine
FULL_BYTES = 2**20  # with less free space, a worker may fail without an error message
LOG_BYTES = 1 << 16  # at the end of a log, of which the last lines are shown
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
        layout: Layout = ALONE,  # of the machines that train
        peers: Peers | None = None,  # the other machines, on machine 0
        offer: Callable[[], None] = lambda: None,  # uploads the stage's inputs for machines with separate caches
        owns_scratch: bool = True,  # no other machine uses the same folder
        fork: Callable[..., ForkedWorker] | None = None,  # starts a single worker
    ) -> None:
        self._entry, self._plan, self._recipe, self._store, self._log = entry, plan, recipe, store, log
        self._layout = layout if entry.stage.trains else ALONE
        self._peers = peers if entry.stage.trains else None
        self._offer, self._owns_scratch, self._fork = offer, owns_scratch, fork
        self._work = store.work(entry.stage, str(entry.key))
        self._scratch = self._work / SCRATCH
        self._cores = available_cores()

    def run(self, progress: RunView, stop: StopRequest, tracker: TrackerProcess, notifier: Notifier) -> dict[str, Any]:
        """Launches the stage's processes and waits for them; returns the result of the workers.

        A training is retried after machine faults, as [parallel] says. Raises StageError, or PausedError for an alert.
        """
        stage, parallel = self._entry.stage, self._recipe.head.parallel
        self._relay = _MetricsRelay(MetricsReader(self._work / METRICS), progress, notifier, self._entry.name)
        if stage.trains:
            tracker.follow(self._relay.reader, self._store.folder(stage, str(self._entry.key)) / METRICS, self._facts())
        self._prepare(stop)
        if not stage.trains:
            processes = self._local if stage.in_processes else 1
            self._launch_group(processes, ALONE, stop)
            return {"processes": processes, **self._result()}
        policy = RetryPolicy(self._scratch, parallel, processes=self._local * self._layout.machines)
        if self._peers and self._peers.is_broken:
            policy.processes = 1
        while True:
            processes = policy.processes
            layout, peers = (self._layout, self._peers) if processes > 1 else (ALONE, None)
            watchdog = Watchdog(self._scratch, minutes=parallel.stall_minutes)
            try:
                if peers:
                    self._begin_with(peers)
                self._launch_group(processes, layout, stop, watchdog=watchdog, tick=peers.check if peers else None)
            except MachineError as fault:
                cause = "; ".join([*(peers.causes() if peers else []), fault.cause])
                then = policy.after_fault(cause, step=self._relay.step)
                if then is None:
                    raise MachineError(self._entry.name, cause, fault.details) from fault
                text = f"{self._entry.name}: {cause}; it {then}"
                progress.note(text)
                notifier.send(text)
                if peers:
                    peers.notify(text)
                    if policy.processes == 1:
                        peers.give_up()
            else:
                machines = {"machines": layout.machines} if layout.machines > 1 else {}
                faults = {"faults": policy.faults} if policy.faults else {}
                return {"processes": processes, **machines, **faults, **self._result()}

    def take_part(self, progress: RunView, stop: StopRequest, *, ready: Callable[[], None], tick: Callable[[], None]) -> None:
        """This machine's part of one attempt at a training of machine 0: prepares, calls `ready`, launches its processes and
        waits for their end.
        """
        self._relay = _MetricsRelay(MetricsReader(self._work / METRICS), progress, None, self._entry.name)
        if self._owns_scratch:
            self._prepare(stop)
        ready()
        self._launch_group(self._local * self._layout.machines, self._layout, stop, tick=tick)

    def _begin_with(self, peers: Peers) -> None:
        """Returns when all machines start the training."""
        try:
            peers.assemble()
            self._offer()
            peers.begin(self._entry.name, self._announcement())
        except MachineLostError as lost:
            self._raise(lost)

    @cached_property
    def _local(self) -> int:
        """The number of processes of a training on this machine."""
        return resources.process_count(self._recipe.head.parallel)

    def _prepare(self, stop: StopRequest) -> None:
        """Removes leftovers of an earlier run and runs `Stage.prepare`, before a training group forms."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        for name in (STOP, PAUSED):
            (self._scratch / name).unlink(missing_ok=True)
        if type(self._entry.stage).prepare is not Stage.prepare and not (self._scratch / PREPARED).exists():
            self._launch(launch.plain_command(self._job(1), "--prepare"), stop, threads=self._cores)
            (self._scratch / PREPARED).touch()

    def _launch_group(
        self,
        processes: int,  # of all machines
        layout: Layout,
        stop: StopRequest,
        *,
        watchdog: Watchdog | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        local = processes // layout.machines
        command = launch.group_command(self._job(processes, layout), local, layout)
        self._launch(command, stop, threads=max(1, self._cores // local), watchdog=watchdog, tick=tick)

    def _announcement(self) -> dict[str, Any]:
        """What the other machines need to check and take part in a training."""
        above = [entry for entry in self._plan if entry.name in self._plan.above(self._entry.name)]
        return {
            "processes": self._local,
            "identities": {entry.name: entry.identity for entry in (*above, self._entry) if entry.identity is not None},
            "records": [entry.record.sealed.decode() for entry in above if entry.record is not None],
        }

    def _result(self) -> dict[str, Any]:
        return dict(json.loads((self._scratch / RESULT).read_text(encoding="utf-8")))

    def _launch(
        self,
        command: list[str],
        stop: StopRequest,
        *,
        threads: int,
        watchdog: Watchdog | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        """Runs a command to its end. Raises MachineError where a retry may help, KeyboardInterrupt after a request to stop."""
        log_start = os.fstat(self._log.fileno()).st_size
        for name in (RESULT, ERROR) if self._owns_scratch else ():
            (self._scratch / name).unlink(missing_ok=True)
        environment = launch.environment_of(threads)
        peer_faults: list[tuple[float, StageError]] = []  # after one, the processes here end by themselves

        def check() -> None:
            self._store.raise_if_lost(self._entry.stage, str(self._entry.key))
            if stop.requested:
                (self._scratch / STOP).touch()
            self._relay.forward()
            if tick and not peer_faults:
                try:
                    tick()
                except StageError as error:
                    peer_faults.append((time.monotonic(), error))
            if peer_faults and time.monotonic() - peer_faults[0][0] > PEER_FAULT_SECONDS:
                self._raise(peer_faults[0][1])
            if watchdog and watchdog.is_too_quiet():
                liveness.show_stacks(self._scratch)
                raise MachineError(
                    self._entry.name,
                    f"a step has not ended for {duration(watchdog.quiet)}, so its processes are killed",
                    f"(their stacks are at the end of {self._log.name})",
                )

        try:
            with launch.started(command, log=self._log, environment=environment, fork=self._fork) as process:
                code = launch.wait(process, tick=check, stopping=lambda: stop.requested)
        finally:
            liveness.end(self._scratch)
        self._relay.forward()
        if code == 0:
            return
        if (self._scratch / PAUSED).exists():
            message = json.loads((self._scratch / PAUSED).read_text(encoding="utf-8"))["message"]
            raise PausedError(f"stage {self._entry.name!r}: {message}; run the same command to continue")
        if not (self._scratch / ERROR).exists():
            stop.raise_if_requested()
        if peer_faults:
            self._raise(peer_faults[0][1])
        raise self._failure(code, log_start)

    def _raise(self, fault: StageError) -> NoReturn:
        """Raises a fault of another machine, as MachineError if a retry may help."""
        if isinstance(fault, MachineLostError) or (isinstance(fault, PeerFailedError) and fault.again):
            raise MachineError(self._entry.name, str(fault), "") from fault
        raise fault

    def _failure(self, code: int | None, log_start: int) -> StageError:
        """Why the workers failed: their own error message, else how they died and the end of their log."""
        log, name = Path(self._log.name), self._entry.name
        with log.open("rb") as file:
            file.seek(max(log_start, os.fstat(file.fileno()).st_size - LOG_BYTES))
            last = file.read().decode(errors="replace").splitlines()
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

    def _job(self, processes: int, layout: Layout = ALONE) -> Path:
        """Writes the job file, one per machine since paths may differ; returns its path."""
        path = self._scratch / (JOB if self._layout.is_main else f"job-{self._layout.rank}.json")
        cores = self._cores * layout.machines
        job_of(self._entry, self._plan, self._recipe, self._store, work=self._work, processes=processes, cores=cores).write(
            path
        )
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


def job_of(entry: Entry, plan: Plan, recipe: Recipe, store: Store, *, work: Path, processes: int, cores: int) -> Job:
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
