"""What each stage of a recipe would do now, and why: a pure reading of recipe and cache, which runs and fetches nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from runner.artifacts import SCRATCH
from runner.code import code_digest
from runner.graph import ancestors, differences, identity, in_order, inputs_of, key_of
from runner.job import PAUSED
from runner.recipe import Recipe
from runner.record import Record
from runner.stage import Effect, Stage, Verdict
from runner.store import Store

State = Literal["cached", "run", "resume", "waiting", "push", "skipped", "failed", "paused"]
RUNNABLE: frozenset[State] = frozenset({"run", "resume", "paused"})


@dataclass(frozen=True)
class Entry:
    """One stage in a plan."""

    name: str
    stage: Stage
    state: State
    reason: str
    key: str | None  # unknown while the content of an input is
    identity: Mapping[str, Any] | None
    record: Record | None
    path: Path | None  # of the finished artifact
    verdicts: Sequence[Verdict] = ()
    effect: Effect | None = None

    @property
    def failed_gates(self) -> list[Verdict]:
        """The gates that the artifact did not pass."""
        return [verdict for verdict in self.verdicts if not verdict.passed]


class Plan:
    """The entries of a recipe in topological order."""

    def __init__(self, recipe: Recipe, store: Store, *, until: str | None = None) -> None:
        wanted = ancestors(recipe.stages, until) | {until} if until else set(recipe.stages)
        self._stages = {name: recipe.stages[name] for name in in_order(recipe.stages) if name in wanted}
        self._inputs = inputs_of(self._stages)
        self._store = store
        self.entries: dict[str, Entry] = {}
        for name in self._stages:
            self.entries[name] = self._known(name)
        for name in reversed(self._stages):
            self.entries[name] = self._with_need(name)
        for name in self._stages:
            self.entries[name] = self._with_judgement(name)
        store.digests.save()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def inputs(self, name: str) -> list[str]:
        """The stages that a stage reads."""
        return self._inputs[name]

    def record(self, name: str) -> Record:
        """The record of a stage that is finished, as the inputs of a stage that can run are."""
        record = self.entries[name].record
        assert record is not None, name
        return record

    def still_holds(self, entry: Entry) -> bool:
        """Whether the input files of a stage are what they were when it was planned."""
        artifacts = {source: self.record(source).digest for source in self._inputs[entry.name]}
        return identity(entry.stage, artifacts=artifacts, files=self._store.digests.of_inputs) == entry.identity

    def next(self) -> Entry | None:
        """The first stage that can run now."""
        return next((entry for entry in self if entry.state in RUNNABLE), None)

    def _known(self, name: str) -> Entry:
        """What keys and records alone tell of a stage."""
        stage = self._stages[name]
        unknown = [source for source in self._inputs[name] if self.entries[source].record is None]
        if unknown:
            return Entry(name, stage, "waiting", f"for {', '.join(unknown)}", None, None, None, None)
        artifacts = {source: entry.record.digest for source in self._inputs[name] if (entry := self.entries[source]).record}
        what = identity(stage, artifacts=artifacts, files=self._store.digests.of_inputs)
        key = key_of(what)
        record = self._store.record(stage, key)
        if record is None:
            scratch = self._store.work(stage, key) / SCRATCH
            if (scratch / PAUSED).exists():
                return Entry(name, stage, "paused", "by an alert; run goes on from its checkpoint", key, what, None, None)
            resumable = scratch.exists()
            reason = "goes on where it was interrupted" if resumable else self._why_new(stage, what, key)
            return Entry(name, stage, "resume" if resumable else "run", reason, key, what, None, None)
        path = self._store.folder(stage, key) if self._store.has_artifact(record) else None
        other_code = record.data.get("code") != code_digest(type(stage))
        return Entry(name, stage, "cached", "made by other code" if other_code else "", key, what, record, path)

    def _with_need(self, name: str) -> Entry:
        """Runs a stage whose artifact is gone only if a stage that must run, or the user, reads the artifact."""
        entry = self.entries[name]
        if entry.state != "cached" or entry.path is not None:
            return entry
        readers = [other for other in self._stages if name in self._inputs[other]]
        running = [reader for reader in readers if self.entries[reader].state in RUNNABLE]
        if running:
            return replace(entry, state="run", reason=f"its artifact is gone or damaged, and {running[0]} must read it")
        if not readers:
            return replace(entry, state="run", reason="its artifact is gone or damaged")
        return replace(entry, reason="artifact gone, not needed now")

    def _with_judgement(self, name: str) -> Entry:
        """Judges what is finished; what stands behind a failed gate is skipped."""
        entry = self.entries[name]
        behind = [source for source in self._inputs[name] if self._blocked(source)]
        if behind:
            return replace(entry, state="skipped", reason=f"a gate of {', '.join(behind)} failed")
        if entry.state != "cached" or entry.record is None:
            return entry
        verdicts = entry.stage.verdicts(entry.record.data["metrics"])
        failed = [str(verdict) for verdict in verdicts if not verdict.passed]
        if failed:
            return replace(entry, verdicts=verdicts, reason="; ".join(failed))
        if entry.path is None:
            return replace(entry, verdicts=verdicts)
        effect = entry.stage.effect(entry.path, digest=entry.record.digest, receipts=self._store.root / "receipts")
        if effect is None:
            return replace(entry, verdicts=verdicts)
        return replace(
            entry, verdicts=verdicts, effect=effect, state="push" if effect.act else entry.state, reason=effect.sentence
        )

    def _blocked(self, name: str) -> bool:
        return bool(self.entries[name].failed_gates) or self.entries[name].state == "skipped"

    def _why_new(self, stage: Stage, what: Mapping[str, Any], key: str) -> str:
        """The fields and inputs that differ from the nearest cached result of the same kind."""
        if self._store.has_damaged_record(stage, key):
            return "its record is damaged"
        candidates = [record for record in self._all_records if record.kind == stage.kind]
        if not candidates:
            return "never run"
        changes: list[list[str]] = [differences(record.data["identity"], what) for record in candidates]
        fewest: list[str] = min(changes, key=len)
        return "; ".join(fewest)

    @cached_property
    def _all_records(self) -> list[Record]:
        return self._store.records()


def as_json(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "recipe": recipe.head.name,
        "stages": [
            {
                "name": entry.name,
                "kind": entry.stage.kind,
                "state": entry.state,
                "reason": entry.reason,
                "key": entry.key,
                "path": str(entry.path) if entry.path else None,
            }
            for entry in plan
        ],
    }
