"""The scheduler: takes each stage of a recipe in order from the cache or runs it, until nothing is left to do.

It plans again after each stage, so that a result equal to an older one leaves the stages below it cached.
"""

import datetime
import functools
import time
from collections.abc import Iterable, Mapping
from typing import IO

from runner.cache.leases import LeaseLostError
from runner.cache.record import Record
from runner.cache.remote import Mirror
from runner.cache.run_log import log_run
from runner.cache.store import Store
from runner.engine.interface import Engine, Fork
from runner.engine.local import LocalEngine
from runner.errors import GateError, StageError
from runner.execution.fork_server import ForkServer, fork_server
from runner.execution.notifications import Notifier
from runner.execution.stage_run import StageRun
from runner.execution.stop import LockWait, StopRequest
from runner.graph import input_files
from runner.planning import outcomes
from runner.planning.code_digest import code_digest
from runner.planning.data_look import check_artifacts, check_data
from runner.planning.plan import RUNNABLE, Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView, duration
from runner.resources import process_count
from runner.stage import EffectContext, Stage
from runner.tracking.tracker_process import TrackerProcess


class Scheduler:
    """One run of one recipe on one cache."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        progress: RunView,
        stop: StopRequest,
        *,
        remote: str | None = None,
        overwrite: bool = False,
        engine: Engine | None = None,  # where its processes run; by default this machine
    ) -> None:
        self._recipe, self._store, self._progress, self._stop = recipe, store, progress, stop
        upload = recipe.head.cache.upload
        self._effects = EffectContext(overwrite=overwrite, note=progress.note, sleep=self._stop.sleep)
        self._mirror = Mirror(remote, note=progress.note, tick=self._stop.raise_if_requested, upload=upload)
        self._tracker = TrackerProcess(store.root, recipe.head.tracking.to)
        self._notifier = Notifier(recipe.head.name, recipe.head.alerts.notify, warn=progress.note)
        self._engine = engine or LocalEngine()
        self._names: set[str] = set()  # <kind>-<key> of all stages so far
        self._fork_server: ForkServer | None = None  # of all stages, or of those that import something slow if any does

    def run(self, *, until: str | None = None, force: Iterable[str] = ()) -> Plan:
        """Runs the plan, and returns the last one. StageError, GateError, PausedError after an alert, or KeyboardInterrupt
        after a request to stop.
        """
        forced, made = {stage for name in force for stage in self._recipe.names_of(name)}, set[str]()
        plan = self._plan(until, forced)
        check_data(plan, self._progress.note)
        self._progress.planned(plan)
        try:
            self._fork_server = self._fork_server_for(plan)
            while (entry := plan.next()) or not self._verify(_to_push(plan)):
                self._stop.raise_if_requested()
                if entry and entry.key in made:
                    raise StageError(f"stage {entry.name!r}: its artifact changed right after it was made; check the disk")
                if entry and self._run_stage(entry, plan):
                    made.add(str(entry.key))
                plan = self._plan(until, forced)
                check_artifacts(plan)
            self._stop.raise_if_requested()
            self._logged(plan, until, complete=True)
            self._perform_effects(plan)
        finally:
            if self._fork_server:
                self._fork_server.close()
            if warning := self._tracker.close():
                self._progress.note(warning)
        self._judge_gates(plan)
        return plan

    def _fork_server_for(self, plan: Plan) -> ForkServer | None:
        """The fork server for the remaining stages of one process, if they import anything slow: it imports that from now
        on."""
        here = process_count(self._recipe.head.parallel)
        pending = (entry.stage for entry in plan if entry.state in RUNNABLE or entry.state == "waiting")
        left = [stage for stage in pending if here == 1 or not (stage.trains or stage.in_processes)]
        modules = [module for stage in left for module in stage.imports]
        return fork_server(modules, place=self._store.root) if modules and self._engine.kind == "local" else None

    def _fork_for(self, stage: Stage) -> Fork | None:
        """What forks the workers of a stage. Stages that import nothing slow have a server if all do so; else they would wait
        for what it imports for the others.
        """
        if self._fork_server is None and self._engine.kind == "local":
            self._fork_server = fork_server([], place=self._store.root)
        if self._fork_server and (stage.imports or not self._fork_server.modules):
            return functools.partial(self._fork_server.start, stage.imports)
        return None

    def _lock_wait(self, entry: Entry) -> LockWait:
        return LockWait(entry.name, self._stop, self._progress.note)

    def _plan(self, until: str | None, forced: set[str]) -> Plan:
        """The plan, after setting aside the artifacts of forced stages with known keys, and after asking the remote for the
        stages that would run: first for records, then for the artifacts that are still needed.
        """
        while True:
            plan = self._logged(Plan(self._recipe, self._store, until=until), until)
            waiting = {entry.name for entry in plan if forced and plan.above(entry.name) & forced}  # their keys may change
            ready = [entry for entry in plan if entry.name in forced - waiting and entry.key]
            for entry in ready:
                self._force(entry)
                forced.discard(entry.name)
            if not ready and not self._fetch_records(plan) and not self._fetch_artifact(plan):
                return plan

    def _force(self, entry: Entry) -> None:
        """Sets the artifact of a stage aside and removes its record."""
        stage, key = entry.stage, str(entry.key)
        self._mirror.without(key)
        with self._store.lock(stage, key, waiting=self._lock_wait(entry)):
            self._store.discard_work(stage, key)
            self._store.forget(key)
            if place := self._store.set_aside(stage, key):
                self._progress.note(f"{entry.name}: the old artifact is set aside in {place}")

    def _fetch_records(self, plan: Plan) -> bool:
        """Takes the records of stages that would run from the remote; whether it had any."""
        missing = [entry for entry in plan if entry.state in RUNNABLE and entry.record is None]
        found = [self._mirror.look_up(self._store, entry.stage.kind, str(entry.key)) for entry in missing]  # all of them
        return any(found)

    def _fetch_artifact(self, plan: Plan) -> bool:
        """Takes one missing artifact from the remote; whether it had one. Later stages come first: they may suffice."""
        for entry in reversed(list(plan)):
            if entry.state in RUNNABLE and entry.record and self._mirror.has(entry.record):
                with self._store.lock(entry.stage, entry.record.key, waiting=self._lock_wait(entry)):
                    if self._store.has_artifact(entry.record) or self._mirror.fetch(self._store, entry.record):
                        self._progress.finished(entry, "fetched from the remote")
                        return True
        return False

    def _logged(self, plan: Plan, until: str | None, *, complete: bool = False) -> Plan:
        """The plan, after logging its keys for `run gc`."""
        names = {f"{entry.stage.kind}-{entry.key}" for entry in plan if entry.key}
        if complete or names - self._names:
            self._names |= names
            used = names if complete else self._names
            log_run(
                self._store.root,
                self._recipe.path,
                self._recipe.resolved(),
                used,
                overrides=self._recipe.overrides,
                until=until,
                complete=complete,
            )
        return plan

    def _perform_effects(self, plan: Plan) -> None:
        """Performs the effects of the plan: pushes."""
        for entry in plan:
            if entry.effect:
                self._progress.note(f"{entry.name}: {entry.effect.sentence}")
                if entry.effect.act:
                    self._progress.note(f"{entry.name}: {entry.effect.act(self._effects)}")

    def _judge_gates(self, plan: Plan) -> None:
        for line in outcomes.passed(plan):
            self._progress.note(line)
        if failed := outcomes.failed(plan):
            skipped = [entry.name for entry in plan if entry.state == "skipped"]
            consequence = f"\nskipped because of it: {', '.join(skipped)}" if skipped else ""
            raise GateError("\n".join(failed) + consequence)

    def _run_stage(self, entry: Entry, plan: Plan) -> bool:
        """Runs one stage under its lock; false if another run made it or took it over, or an input is damaged."""
        try:
            return self._run_locked(entry, plan)
        except LeaseLostError as error:
            self._progress.note(f"{entry.name}: {error}")
            return False

    def _run_locked(self, entry: Entry, plan: Plan) -> bool:
        stage, key = entry.stage, str(entry.key)
        if absent := [f"{field}: {file}" for field, file in input_files(stage) if not (file.hub or file.matches())]:
            raise StageError(f"stage {entry.name!r}: has to run, but its input files are missing: {', '.join(absent)}")
        with self._store.lock(stage, key, waiting=self._lock_wait(entry)) as log:
            record = self._store.record(stage, key)
            if record and self._store.has_artifact(record):
                self._progress.finished(entry, "made by another run")
                return False
            sources = {source: plan.record(source) for source in plan.inputs(entry.name)}
            if entry.beginning:
                sources |= {f"{entry.name}, the stage it continues": entry.beginning}
            with self._store.reading(sources.values(), waiting=self._lock_wait(entry)):
                if not self._verify(sources) or not plan.still_holds(entry):
                    return False
                seconds = self._make(entry, plan, log)
        self._progress.finished(entry, f"done in {duration(seconds)}")
        record = self._store.record(stage, key)
        if record is not None:
            with self._store.reading([record], waiting=self._lock_wait(entry)):
                self._upload(entry.name, record)
        return True

    def _upload(self, name: str, record: Record) -> None:
        """Uploads an artifact, whose lock is held, to the remote if there is one."""
        if self._mirror.offer(record, self._store.folder(record.kind, record.key)):
            self._progress.note(f"{name}: uploaded to the remote")

    def _make(self, entry: Entry, plan: Plan, log: IO[bytes]) -> float:
        """Makes the artifact of a stage, whose locks are held; returns the seconds it took."""
        stage, key = entry.stage, str(entry.key)
        self._progress.started(entry)
        started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        stage_run = StageRun(
            entry,
            plan,
            self._recipe,
            self._store,
            log,
            engine=self._engine,
            fork=self._fork_for(stage),
        )
        result = stage_run.run(self._progress, self._stop, self._tracker, self._notifier)
        seconds = time.monotonic() - clock
        if not plan.still_holds(entry):
            self._store.discard_work(stage, key)
            raise StageError(f"stage {entry.name!r}: an input file changed while it ran, and its result is dropped; run again")
        self._store.finish(
            stage,
            key,
            {
                "stage": entry.name,
                "recipe": self._recipe.head.name,
                "identity": entry.identity,
                "inputs": {plan.written(source): plan.record(source).summary() for source in plan.inputs(entry.name)},
                **({"beginning": entry.beginning.summary()} if entry.beginning else {}),
                "code": code_digest(type(stage)),
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 2),
                **result,
            },
        )
        return seconds

    def _verify(self, records: Mapping[str, Record]) -> bool:
        """Rehashes artifacts before their use; false if one is damaged: it is set aside, and the next plan rebuilds it."""
        for name, record in records.items():
            if not self._store.has_artifact(record, reread=True):
                place = self._store.set_aside(record.kind, record.key)
                where = f"; set aside in {place}" if place else ""
                self._progress.note(f"{name}: its artifact does not match its record{where}; it will be rebuilt")
                return False
        return True


def _to_push(plan: Plan) -> dict[str, Record]:
    """The records of the releases that this run pushes."""
    return {entry.name: entry.record for entry in plan if entry.record and entry.effect and entry.effect.act}
