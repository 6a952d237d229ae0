"""What each stage of a recipe would do now, and why: a pure reading of recipe and cache, which runs and fetches nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from runner.artifacts import PAUSED, SCRATCH
from runner.cache.record import Record
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.graph import ancestors, differences, identity, in_order, inputs_of, key_of, sources_of
from runner.planning.code_digest import code_digest
from runner.recipe.branches import Attempts, Branches, Sweep, sources
from runner.recipe.recipe import Recipe
from runner.stage import Effect, Lineage, Stage, Verdict

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
    beginning: Record | None = None  # a finished result that it goes on from (`Stage.behind`)

    @property
    def failed_gates(self) -> list[Verdict]:
        """The gates that the artifact did not pass."""
        return [verdict for verdict in self.verdicts if verdict.passed is False]

    @property
    def outcome(self) -> bool | None:
        """Whether it passed all its gates; None while that is not known."""
        if self.record is None or any(verdict.passed is None for verdict in self.verdicts):
            return None
        return not self.failed_gates


class Plan:
    """The entries of a recipe in topological order."""

    def __init__(self, recipe: Recipe, store: Store, *, until: str | None = None) -> None:
        self._store = store
        self.recipe = recipe
        self.standing = dict.fromkeys(recipe.families, 0)  # by the stage that names a family, the branch that is relied on
        self.taken: dict[str, int | None] = dict.fromkeys(recipe.families)  # likewise, once that is settled
        self._read(until)
        for family in recipe.families.values():  # each before those that read from it
            self._settle(family, until)
        for name in reversed(self._stages):
            self.entries[name] = self._with_need(name)
        for name in self._stages:
            self.entries[name] = self._with_effect(name)
        store.digests.save()

    def _settle(self, family: Branches, until: str | None) -> None:
        """Decides on which branch what stands behind relies."""
        count = range(len(family.names))
        number, is_final = family.choice(
            [self.outcome(family, n) for n in count],
            [self.score(family, n) if isinstance(family, Sweep) else None for n in count],
        )
        changes = number != self.standing[family.stage] or is_final
        self.standing[family.stage], self.taken[family.stage] = number, number if is_final else None
        if changes:
            self._read(until)

    def _read(self, until: str | None) -> None:
        """What keys, records and gates tell, each stage after those before it."""
        recipe = self.recipe
        stages = recipe.with_branches(self.standing)
        order = sources(stages, recipe.families)
        wanted = recipe.needed(until) if until else set(stages)
        self._stages = {name: stages[name] for name in in_order(order) if name in wanted}
        self._before = sources(self._stages, recipe.families)
        self._inputs, self._sources = inputs_of(self._stages), sources_of(self._stages)
        self._family = {name: family for family in recipe.families.values() for name in family.places}
        self.entries: dict[str, Entry] = {}
        for name in self._stages:
            self.entries[name] = self._known(name)
            self.entries[name] = self._judged(name)
            self.entries[name] = self._held_back(name)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def inputs(self, name: str) -> list[str]:
        """The stages that a stage reads."""
        return self._inputs[name]

    def above(self, name: str) -> set[str]:
        """All stages that come before one."""
        return ancestors(self._before, name)

    def named(self, name: str) -> Entry:
        """The entry of a stage; where the name stands for branches, of the one that is relied on."""
        family = self.recipe.family_of(name)
        return self.entries[name if family is None else family.names[self.standing[family.stage]][name]]

    def written(self, name: str) -> str:
        """What the recipe calls a stage that is relied on now: of a branch, without its number."""
        family = self._family.get(name)
        if family is None:
            return name
        relied_on = family.names[self.standing[family.stage]].items()
        return next((member for member, branched in relied_on if branched == name), name)

    def sources_read(self, name: str) -> dict[str, Record]:
        """The records of what is finished before a stage, by the names that the recipe gives."""
        above = ancestors(self._sources, name)
        return {self.written(source): record for source in above if (record := self.entries[source].record)}

    def outcome(self, family: Branches, number: int) -> bool | None:
        """Whether the gates of a branch hold; None while that is not known."""
        judges = [self.entries.get(name) for name in family.judges_of(number)]
        outcomes = [None if judge is None else judge.outcome for judge in judges]
        return None if None in outcomes else all(outcomes)

    def score(self, sweep: Sweep, number: int) -> float | None:
        """What decides on a setting; None while it is not known. RecipeError if its evaluation made no such score."""
        entry = self.entries.get(sweep.judges_of(number)[0])
        if entry is None or entry.record is None:
            return None
        scores: Mapping[str, float] = entry.record.data["metrics"]["scores"]
        if sweep.score not in scores:
            made = ", ".join(sorted(scores))
            raise RecipeError(f"{self.recipe.path}: sweep: expected the score {sweep.score!r}; {entry.name} has only {made}")
        return scores[sweep.score]

    def family_of(self, name: str) -> Branches | None:
        """The branches that a stage belongs to."""
        return self._family.get(name)

    def stands(self, name: str) -> bool:
        """Whether a stage is more than one of several: one of its own, or of the branch that is taken."""
        family = self._family.get(name)
        return family is None or self.taken[family.stage] in family.places[name]

    def is_needless(self, name: str) -> bool:
        """Whether it belongs to an attempt that is not needed, since one before it passed."""
        family = self._family.get(name)
        if not isinstance(family, Attempts) or (taken := self.taken[family.stage]) is None:
            return False
        return family.places[name][0] > taken

    def is_lost(self, family: Branches) -> bool:
        """Whether no branch passed."""
        return all(self.outcome(family, number) is False for number in range(len(family.names)))

    def _is_given_up(self, name: str) -> bool:
        """Whether it belongs to a branch that nothing relies on now."""
        family = self._family.get(name)
        return family is not None and self.standing[family.stage] not in family.places[name]

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
            resumable, beginning = scratch.exists(), self._beginning(stage, what)
            if not resumable:
                reason = self._why_new(name, stage, what, key)
            elif self._store.is_held_here(stage.kind, key):
                reason = "a process of this machine works on it now"
            else:
                reason = "goes on where it was interrupted"
            if beginning and not resumable:
                reason = f"goes on from {beginning.data['recipe']}'s {beginning.data['stage']}; {reason}"
            state: State = "resume" if resumable or beginning else "run"
            return Entry(name, stage, state, reason, key, what, None, None, beginning=beginning)
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
        if not readers and not self._is_given_up(name):
            return replace(entry, state="run", reason="its artifact is gone or damaged")
        return replace(entry, reason="; ".join(filter(None, [entry.reason, "artifact gone, not needed now"])))

    def _judged(self, name: str) -> Entry:
        """With the verdicts of its gates, once it is finished."""
        entry = self.entries[name]
        if entry.record is None:
            return entry
        records = {other: known.record.data for other, known in self.entries.items() if known.record}
        verdicts = entry.stage.verdicts(entry.record.data["metrics"], Lineage(self._inputs, records))
        told = [str(verdict) for verdict in verdicts if not verdict.passed]
        return replace(entry, verdicts=verdicts, reason="; ".join(told) or entry.reason)

    def _held_back(self, name: str) -> Entry:
        """What stands behind a failed gate is skipped, and so is an attempt after one that passed."""
        entry = self.entries[name]
        family = self._family.get(name)
        if isinstance(family, Attempts) and (number := family.places[name][0]) > self.standing[family.stage]:
            if (taken := self.taken[family.stage]) is not None:
                return replace(entry, state="skipped", reason=f"attempt {taken + 1} of {family.stage} passed")
            return replace(entry, state="waiting", reason=f"until attempt {number} of {family.stage} has failed")
        read = dict.fromkeys(self._family[source].stage for source in self._inputs[name] if source in self._family)
        for other in (self.recipe.families[stage] for stage in read):
            if other is not family and self.taken[other.stage] is None:
                return self._undecided(entry, other)
        behind = [source for source in self._inputs[name] if self._blocked(source)]
        if behind:
            return replace(entry, state="skipped", reason=f"a gate of {', '.join(behind)} failed")
        unjudged = [source for source in self._inputs[name] if any(v.passed is None for v in self.entries[source].verdicts)]
        if unjudged:
            return replace(entry, state="waiting", reason=f"for what the gates of {', '.join(unjudged)} compare with")
        return entry

    def _undecided(self, entry: Entry, family: Branches) -> Entry:
        """What reads from branches of which none is taken, for now or in the end."""
        if isinstance(family, Sweep):
            if self.is_lost(family):
                return replace(entry, state="skipped", reason="no setting of the sweep passed its gates")
            return replace(entry, state="waiting", reason=f"for the {family.criterion} of {len(family.names)} settings")
        if self.is_lost(family):
            return replace(entry, state="skipped", reason=f"no attempt of {family.stage} passed")
        judges = family.judges_of(self.standing[family.stage])
        return replace(entry, state="waiting", reason=f"for the gates of {', '.join(judges)}")

    def _with_effect(self, name: str) -> Entry:
        """With what is left to do in the world once the artifact is there."""
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
        """The finished result that has most of the work behind it, of those that the stage can go on from."""
        alike = [record for record in self._all_records if record.kind == stage.kind]
        behind = [(stage.reusable_work(what, record.data["identity"]), record) for record in alike]
        able = [(amount, record) for amount, record in behind if amount and self._store.has_artifact(record)]
        return max(able, key=lambda pair: pair[0], default=(0, None))[1]

    def _why_new(self, name: str, stage: Stage, what: Mapping[str, Any], key: str) -> str:
        """The fields and inputs that differ from the nearest result of this stage, else from that of another of its kind."""
        if self._store.has_damaged_record(stage, key):
            return "its record is damaged"
        candidates = [record for record in self._all_records if record.kind == stage.kind]
        if not candidates:
            return "never run"
        here = (self.recipe.head.name, name)
        own = [record for record in candidates if (record.data.get("recipe"), record.data.get("stage")) == here]
        changes = [(differences(record.data["identity"], what), record.data) for record in own or candidates]
        fewest, other = min(changes, key=lambda change: len(change[0]))
        told = "; ".join(fewest)
        return told if own else f"never run; unlike {other.get('recipe')}'s {other.get('stage')}: {told}"

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
                **_judgement_as_json(plan, entry),
            }
            for entry in plan
        ],
        **({"sweep": _sweep_as_json(plan, sweep)} if (sweep := recipe.sweep) else {}),
    }


def _judgement_as_json(plan: Plan, entry: Entry) -> dict[str, Any]:
    """Of a stage that is judged, the gates; of one that belongs to branches, to which, and whether what is behind takes it."""
    told: dict[str, Any] = {}
    if entry.verdicts:
        told["gates"] = [
            {"gate": verdict.gate, "found": verdict.found, "passed": verdict.passed} for verdict in entry.verdicts
        ]
    family = plan.family_of(entry.name)
    if isinstance(family, Sweep):
        numbers = [number + 1 for number in family.places[entry.name]]
        told["setting"] = {"numbers": numbers, "stands": plan.stands(entry.name)}
    elif family is not None:
        number = family.places[entry.name][0]
        told["attempt"] = {
            "of": family.stage,
            "number": number + 1,
            "changes": family.describe(number),
            "stands": plan.stands(entry.name),
        }
    return told


def _sweep_as_json(plan: Plan, sweep: Sweep) -> dict[str, Any]:
    """What is compared by which score, and what came of it so far; `best` counts from 1."""
    best = plan.taken[sweep.stage]
    settings = [
        {
            "number": number + 1,
            "values": {str(axis): value for axis, value in zip(sweep.axes, sweep.values(number), strict=True)},
            "score": plan.score(sweep, number),
            "passed": plan.outcome(sweep, number),
        }
        for number in range(len(sweep.names))
    ]
    return {"wanted": sweep.criterion, "best": None if best is None else best + 1, "settings": settings}
