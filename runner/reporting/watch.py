"""Watches a run that was started elsewhere. It only reads the cache: it writes nothing and does not contact the run.

A stage is running while its key is locked. Its metrics are followed as the run itself follows them.
"""

import time
from collections.abc import Callable
from pathlib import Path

from runner.artifacts import METRICS
from runner.cache.run_log import logged_runs
from runner.cache.store import Store
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView
from runner.tracking.metrics_file import MetricsReader

METRICS_SECONDS = 0.5  # between two reads of the metrics
PLAN_SECONDS = 2.0  # between two plans


def running_overrides(store: Store, recipe: Path) -> list[str]:
    """The `--set` of the run of `recipe` that holds a stage of the cache now; none if there is no such run."""
    path = str(recipe.resolve())
    for _, run in logged_runs(store.root):
        if run.path == path and not all(store.is_free(*name.split("-", 1)) for name in run.names):
            return list(run.overrides)
    return []


class RunWatcher:
    """Shows one recipe on one cache in a view."""

    def __init__(self, recipe: Recipe, store: Store, view: RunView) -> None:
        self._recipe, self._store, self._view = recipe, store, view
        self._running: Entry | None = None
        self._metrics: MetricsReader | None = None
        self._done: set[str] = set()  # stages that are shown as finished

    def until_done(self, *, patience: float | None, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Watches until every stage is finished, or no stage has run for `patience` seconds; returns whether all are."""
        plan = Plan(self._recipe, self._store)
        self._view.planned(plan)
        self._done = {entry.name for entry in plan if entry.state == "cached"}
        planned = idle_since = time.monotonic()
        while True:
            self._update(plan)
            if self._running is not None:
                idle_since = time.monotonic()
            if all(entry.record is not None for entry in plan):
                return True
            if patience is not None and time.monotonic() - idle_since > patience:
                return False
            sleep(METRICS_SECONDS)
            if time.monotonic() - planned >= PLAN_SECONDS:
                plan, planned = Plan(self._recipe, self._store), time.monotonic()

    def _update(self, plan: Plan) -> None:
        """Shows what has changed since the last update."""
        if self._metrics is not None:
            for line in self._metrics.new_lines():
                self._view.reported(line)
        for entry in plan:
            if entry.record is not None and entry.name not in self._done:
                self._done.add(entry.name)
                self._view.finished(entry, f"done in {entry.record.data['seconds']:.0f}s")
        if self._running is not None and (self._running.name in self._done or self._is_free(self._running)):
            self._running = self._metrics = None
        if self._running is None:
            self._running = next(
                (entry for entry in plan if entry.record is None and entry.key and not self._is_free(entry)), None
            )
            if self._running is not None:
                work = self._store.work(self._running.stage, str(self._running.key))
                self._metrics = MetricsReader(work / METRICS, offset=0)
                self._view.started(self._running)

    def _is_free(self, entry: Entry) -> bool:
        return self._store.is_free(entry.stage.kind, str(entry.key))
