"""The plan of a recipe: the state of each stage and the reason, from recipe and cache alone. It runs and fetches nothing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from runner.artifacts import ERROR, PAUSED, SCRATCH
from runner.cache.record import Record
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.graph import ancestors, differences, identity, in_order, inputs_of, key_of, sources_of
from runner.planning.code_digest import code_digest
from runner.recipe.branches import Attempts, Branches, Sweep, predecessors
from runner.recipe.recipe import Recipe
from runner.stage import Effect, Lineage, Stage, Verdict

State = Literal["cached", "run", "resume", "waiting", "push", "skipped", "paused"]
COMPARED = 200  # results, the newest, of which the closest tells why a stage runs
RUNNABLE: frozenset[State] = frozenset({"run", "resume", "paused"})


@dataclass(frozen=True)
class Entry:
    """One stage in a plan."""

    name: str
    stage: Stage
    state: State
    reason: str
    key: str | None  # None while the content of an input is unknown
    identity: Mapping[str, Any] | None
    record: Record | None
    path: Path | None  # of the finished artifact
    verdicts: Sequence[Verdict] = ()
    effect: Effect | None = None
    beginning: Record | None = None  # a finished result that it continues from (`Stage.reusable_work`)

    @property
    def failed_gates(self) -> list[Verdict]:
        """The gates that the artifact did not pass."""
        return [verdict for verdict in self.verdicts if verdict.passed is False]

    @property
    def outcome(self) -> bool | None:
        """Whether it passed all its gates; None while that is unknown."""
        if self.record is None or any(verdict.passed is None for verdict in self.verdicts):
            return None
        return not self.failed_gates


class Plan:
    """The entries of a recipe in topological order."""

    def __init__(self, recipe: Recipe, store: Store, *, until: str | None = None) -> None:
        self._store = store
        self.recipe = recipe
        self.selected = dict.fromkeys(
            recipe.families, 0
        )  # by family: the branch that later stages read until one is decided on
        self.decided: dict[str, int | None] = dict.fromkeys(recipe.families)  # by family: the branch that was decided on
        self._by_kind: dict[str, list[Record]] = {}
        self._read(until)
        for family in recipe.families.values():  # each before the families that read from it
            self._select(family, until)
        for name in reversed(self._stages):
            self.entries[name] = self._rebuilt_if_needed(name)
        for name in self._stages:
            self.entries[name] = self._with_effect(name)
        store.digests.save()

    def _select(self, family: Branches, until: str | None) -> None:
        """Selects the branch that later stages read."""
        count = range(len(family.names))
        number, is_final = family.choice(
            [self.outcome(family, n) for n in count],
            [self.score(family, n) if isinstance(family, Sweep) else None for n in count],
        )
        changes = number != self.selected[family.stage] or is_final
        self.selected[family.stage], self.decided[family.stage] = number, number if is_final else None
        if changes:
            self._read(until)

    def _read(self, until: str | None) -> None:
        """Makes the entries from keys, records and gates, in topological order."""
        recipe = self.recipe
        stages = recipe.with_branches(self.selected)
        order = predecessors(stages, recipe.families)
        wanted = recipe.needed(until) if until else set(stages)
        self._stages = {name: stages[name] for name in in_order(order) if name in wanted}
        self._before = predecessors(self._stages, recipe.families)
        self._inputs, self._sources = inputs_of(self._stages), sources_of(self._stages)
        self._family = {name: family for family in recipe.families.values() for name in family.numbers}
        self.entries: dict[str, Entry] = {}
        for name in self._stages:
            self.entries[name] = self._from_records(name)
            self.entries[name] = self._with_verdicts(name)
            self.entries[name] = self._skipped_or_waiting(name)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def inputs(self, name: str) -> list[str]:
        """The stages that a stage reads."""
        return self._inputs[name]

    def above(self, name: str) -> set[str]:
        """All stages that come before one."""
        return ancestors(self._before, name)

    def named(self, name: str) -> Entry:
        """The entry of a stage by its name in the recipe: in a family of branches, that of the selected one."""
        family = self.recipe.family_of(name)
        return self.entries[name if family is None else family.names[self.selected[family.stage]][name]]

    def written(self, name: str) -> str:
        """The name of a stage in the recipe: for a stage of the selected branch, without the number of the branch."""
        family = self._family.get(name)
        if family is None:
            return name
        selected = family.names[self.selected[family.stage]].items()
        return next((member for member, branched in selected if branched == name), name)

    def sources_read(self, name: str) -> dict[str, Record]:
        """The records of the finished stages before a stage, by their names in the recipe."""
        above = ancestors(self._sources, name)
        return {self.written(source): record for source in above if (record := self.entries[source].record)}

    def outcome(self, family: Branches, number: int) -> bool | None:
        """Whether the gates of a branch passed; None while that is unknown."""
        judges = [self.entries.get(name) for name in family.judges_of(number)]
        outcomes = [None if judge is None else judge.outcome for judge in judges]
        return None if None in outcomes else all(outcomes)

    def score(self, sweep: Sweep, number: int) -> float | None:
        """The deciding score of a setting; None while it is unknown. RecipeError if its evaluation has no such score."""
        entry = self.entries.get(sweep.judges_of(number)[0])
        if entry is None or entry.record is None:
            return None
        scores: Mapping[str, float] = entry.record.data["metrics"]["scores"]
        if sweep.score not in scores:
            names = ", ".join(sorted(scores))
            raise RecipeError(
                f"{self.recipe.path}: sweep: expected the score {sweep.score!r}, but {entry.name} has only {names}"
            )
        return scores[sweep.score]

    def family_of(self, name: str) -> Branches | None:
        """The branches that a stage belongs to."""
        return self._family.get(name)

    def is_in_use(self, name: str) -> bool:
        """Whether a stage is not of a branch, or of the branch that was decided on."""
        family = self._family.get(name)
        return family is None or self.decided[family.stage] in family.numbers[name]

    def is_needless(self, name: str) -> bool:
        """Whether it belongs to an attempt that is not needed because an earlier one passed."""
        family = self._family.get(name)
        if not isinstance(family, Attempts) or (decided := self.decided[family.stage]) is None:
            return False
        return family.numbers[name][0] > decided

    def all_failed(self, family: Branches) -> bool:
        """Whether every branch failed its gates."""
        return all(self.outcome(family, number) is False for number in range(len(family.names)))

    def _is_unselected(self, name: str) -> bool:
        """Whether it belongs to a branch other than the selected one."""
        family = self._family.get(name)
        return family is not None and self.selected[family.stage] not in family.numbers[name]

    def record(self, name: str) -> Record:
        """The record of a finished stage, such as an input of a stage that can run."""
        record = self.entries[name].record
        assert record is not None, name
        return record

    def still_holds(self, entry: Entry) -> bool:
        """Whether the input files of a stage are unchanged since it was planned."""
        artifacts = {source: self.record(source).digest for source in self._inputs[entry.name]}
        return self._identity(entry.stage, artifacts) == entry.identity

    def next(self) -> Entry | None:
        """The first stage that can run now."""
        return next((entry for entry in self if entry.state in RUNNABLE), None)

    def _from_records(self, name: str) -> Entry:
        """The entry of a stage as far as keys and records determine it."""
        stage = self._stages[name]
        unknown = [source for source in self._inputs[name] if self.entries[source].record is None]
        if unknown:
            return Entry(name, stage, "waiting", f"for {', '.join(unknown)}", None, None, None, None)
        artifacts = {source: entry.record.digest for source in self._inputs[name] if (entry := self.entries[source]).record}
        what = self._identity(stage, artifacts)
        key = key_of(what)
        record = self._store.record(stage, key)
        if record is None:
            scratch = self._store.work(stage, key) / SCRATCH
            if (scratch / PAUSED).exists():
                return Entry(name, stage, "paused", "by an alert; run continues from its checkpoint", key, what, None, None)
            resumable, beginning = scratch.exists(), self._beginning(stage, what)
            refusal = _refusal(scratch)
            if not resumable:
                reason = self._why_new(name, stage, what, key)
            elif refusal and not self._store.is_held_here(stage.kind, key):
                resumable, reason = False, f"was refused: {refusal}"
            elif self._store.is_held_here(stage.kind, key):
                reason = "a process of this machine works on it now"
            else:
                reason = "continues where it was interrupted"
            if beginning and not resumable:
                reason = f"continues from {beginning.made_as}; {reason}"
            state: State = "resume" if resumable or beginning else "run"
            return Entry(name, stage, state, reason, key, what, None, None, beginning=beginning)
        path = self._store.folder(stage, key) if self._store.has_artifact(record) else None
        other_code = record.data.get("code") != code_digest(type(stage))
        return Entry(name, stage, "cached", "made by other code" if other_code else "", key, what, record, path)

    def _identity(self, stage: Stage, artifacts: Mapping[str, str]) -> dict[str, Any]:
        files, recipe = self._store.digests.of_inputs, partial(self.recipe.published, self.selected)
        return identity(stage, artifacts=artifacts, files=files, recipe=recipe)

    def _rebuilt_if_needed(self, name: str) -> Entry:
        """Runs a stage whose artifact is gone if a stage that must run, or the user, reads the artifact."""
        entry = self.entries[name]
        if entry.state != "cached" or entry.path is not None:
            return entry
        readers = [other for other in self._stages if name in self._inputs[other]]
        running = [reader for reader in readers if self.entries[reader].state in RUNNABLE]
        if running:
            return replace(entry, state="run", reason=f"its artifact is gone or damaged, and {running[0]} must read it")
        if not readers and not self._is_unselected(name):
            return replace(entry, state="run", reason="its artifact is gone or damaged")
        return replace(entry, reason="; ".join(filter(None, [entry.reason, "artifact gone, not needed now"])))

    def _with_verdicts(self, name: str) -> Entry:
        """Adds the verdicts of the gates of a finished stage."""
        entry = self.entries[name]
        if entry.record is None:
            return entry
        records = {other: known.record.data for other, known in self.entries.items() if known.record}
        verdicts = entry.stage.verdicts(entry.record.data["metrics"], Lineage(self._inputs, records))
        reasons = [str(verdict) for verdict in verdicts if not verdict.passed]
        return replace(entry, verdicts=verdicts, reason="; ".join(reasons) or entry.reason)

    def _skipped_or_waiting(self, name: str) -> Entry:
        """Skips stages after a failed gate and attempts after one that passed, and holds back what is undecided."""
        entry = self.entries[name]
        family = self._family.get(name)
        if isinstance(family, Attempts) and (number := family.numbers[name][0]) > self.selected[family.stage]:
            if (decided := self.decided[family.stage]) is not None:
                return replace(entry, state="skipped", reason=f"attempt {decided + 1} of {family.stage} passed")
            return replace(entry, state="waiting", reason=f"until attempt {number} of {family.stage} has failed")
        read = dict.fromkeys(self._family[source].stage for source in self._inputs[name] if source in self._family)
        for other in (self.recipe.families[stage] for stage in read):
            if other is not family and self.decided[other.stage] is None:
                return self._undecided(entry, other)
        if blocked := [source for source in self._inputs[name] if self._blocked(source)]:
            return replace(entry, state="skipped", reason=f"a gate of {', '.join(blocked)} failed")
        unjudged = [source for source in self._inputs[name] if any(v.passed is None for v in self.entries[source].verdicts)]
        if unjudged:
            return replace(entry, state="waiting", reason=f"for what the gates of {', '.join(unjudged)} compare with")
        return entry

    def _undecided(self, entry: Entry, family: Branches) -> Entry:
        """The entry of a stage that reads branches without a decision, for now or for good."""
        if isinstance(family, Sweep):
            if self.all_failed(family):
                return replace(entry, state="skipped", reason="no setting of the sweep passed its gates")
            return replace(entry, state="waiting", reason=f"for the {family.criterion} of {len(family.names)} settings")
        if self.all_failed(family):
            return replace(entry, state="skipped", reason=f"no attempt of {family.stage} passed")
        judges = family.judges_of(self.selected[family.stage])
        return replace(entry, state="waiting", reason=f"for the gates of {', '.join(judges)}")

    def _with_effect(self, name: str) -> Entry:
        """Adds the effect outside the cache, such as a push, that a finished stage still has."""
        entry = self.entries[name]
        if entry.state != "cached" or entry.path is None or entry.record is None or entry.failed_gates:
            return entry
        effect = entry.stage.effect(entry.path, digest=entry.record.digest, receipts=self._store.root / "receipts")
        if effect is None:
            return entry
        return replace(entry, effect=effect, state="push" if effect.act else entry.state, reason=effect.sentence)

    def _blocked(self, name: str) -> bool:
        return bool(self.entries[name].failed_gates) or self.entries[name].state == "skipped"

    def _beginning(self, stage: Stage, what: Mapping[str, Any]) -> Record | None:
        """The finished result that the stage can continue from and that has most of its work done."""
        if type(stage).reusable_work is Stage.reusable_work:
            return None
        done = [(stage.reusable_work(what, record.data["identity"]), record.key) for record in self._alike(stage.kind)]
        for _, key in sorted(((amount, key) for amount, key in done if amount), reverse=True):
            record = self._store.record(stage, key)
            if record is not None and self._store.has_artifact(record):
                return record
        return None

    def _why_new(self, name: str, stage: Stage, what: Mapping[str, Any], key: str) -> str:
        """The fields and inputs that differ from the closest result of this stage, else of another stage of its kind."""
        if self._store.has_damaged_record(stage, key):
            return "its record is damaged"
        candidates = self._alike(stage.kind)
        if not candidates:
            return "never run"
        here = (self.recipe.head.name, name)
        own = [record for record in candidates if (record.data.get("recipe"), record.data.get("stage")) == here]
        changes = [(differences(record.data["identity"], what), record) for record in (own or candidates)[:COMPARED]]
        fewest, other = min(changes, key=lambda change: len(change[0]))
        reason = "; ".join(fewest)
        return reason if own else f"never run; unlike {other.made_as}: {reason}"

    def _alike(self, kind: str) -> list[Record]:
        """The records of a kind whose identity is one of a stage, newest first."""
        if kind not in self._by_kind:
            known = [(record, record.data["identity"]) for record in self._store.records([kind])]
            self._by_kind[kind] = [record for record, one in known if isinstance(one.get("fields"), dict) and "version" in one]
        return self._by_kind[kind]


def _refusal(scratch: Path) -> str | None:
    """Why the last run of a stage was refused before it had done anything that another run would continue from."""
    if any((scratch / "checkpoints").glob("step-*")):  # of a training
        return None
    try:
        error = json.loads((scratch / ERROR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if error["again"] else str(error["message"])
