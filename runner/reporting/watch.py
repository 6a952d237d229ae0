"""Watching a run that was started elsewhere: what it does is read from the cache alone, and nothing is asked of it or written.

A stage is running while somebody holds its key's lock and its work folder is there; its metrics are followed as the run itself
follows them.
"""

import time
from collections.abc import Callable

from runner.artifacts import METRICS
from runner.cache.store import Store
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView
from runner.tracking.metrics_file import MetricsReader

LOOK_SECONDS = 0.5  # between two looks at the metrics
PLAN_SECONDS = 2.0  # between two looks at what runs


class Watch:
    """One recipe on one cache, seen from outside."""

    def __init__(self, recipe: Recipe, store: Store, progress: RunView) -> None:
        self._recipe, self._store, self._progress = recipe, store, progress
        self._running: Entry | None = None
        self._metrics: MetricsReader | None = None
        self._done: set[str] = set()  # names of stages whose end was told

    def until_done(self, *, patience: float | None, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Tells what happens until every stage is finished, or nothing has run for `patience` seconds; whether all is."""
        plan = Plan(self._recipe, self._store)
        self._progress.planned(plan)
        self._done = {entry.name for entry in plan if entry.state == "cached"}
        looked = idle_since = time.monotonic()
        while True:
            self._look(plan)
            if self._running is not None:
                idle_since = time.monotonic()
            if all(entry.record is not None for entry in plan):
                return True
            if patience is not None and time.monotonic() - idle_since > patience:
                return False
            sleep(LOOK_SECONDS)
            if time.monotonic() - looked >= PLAN_SECONDS:
                plan, looked = Plan(self._recipe, self._store), time.monotonic()

    def _look(self, plan: Plan) -> None:
        """Tells what changed since the last look."""
        if self._metrics is not None:
            for line in self._metrics.new_lines():
                self._progress.reported(line)
        for entry in plan:
            if entry.record is not None and entry.name not in self._done:
                self._done.add(entry.name)
                self._progress.finished(entry, f"done in {entry.record.data['seconds']:.0f}s")
                if self._running is not None and self._running.name == entry.name:
                    self._running = self._metrics = None
        if self._running is not None and self._is_free(self._running):
            self._running = self._metrics = None
        if self._running is None:
            self._running = next(
                (entry for entry in plan if entry.record is None and entry.key and not self._is_free(entry)), None
            )
            if self._running is not None:
                work = self._store.work(self._running.stage, str(self._running.key))
                self._metrics = MetricsReader(work / METRICS, offset=0)
                self._progress.started(self._running)

    def _is_free(self, entry: Entry) -> bool:
        return self._store.is_free(entry.stage.kind, str(entry.key))
