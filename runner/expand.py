"""The expansion of a recipe: what stands for several stages becomes ordinary stages, before anything is planned.

    attempts = [{ r = 8 }, { r = 4, learning_rate = 1e-3 }]

on the stage `medical` makes a branch of each attempt: `medical@1`, `medical@2`, and likewise every stage between it and the
gates behind it (`release@1`, `after@1`, ...). A stage behind the branches reads the one that stands: the first that has not
failed its gates. Which that is, and that an attempt only runs once the one before it has failed, is the business of
`runner.plan`; here are pure functions over stages, and names are no part of any key.

Last, a stage that stands for several (`Stage.parted`) becomes those: a pretraining with a "wsd" schedule its trunk and what
follows. One that has attempts stays whole, since trunks would be trained of attempts that are never needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from runner.graph import ancestors, inputs_of, renamed, sources_of
from runner.reading.faults import shown
from runner.reading.tables import merged
from runner.stage import Stage

SIGN = "@"  # between the name of a stage and the number of an attempt, from 1


@dataclass(frozen=True)
class Attempts:
    """The attempts of one stage. They are counted from 0; `members` are names as written, the stage with attempts first."""

    changes: tuple[Mapping[str, Any], ...]  # what each attempt changes, as a table over the stage
    tries: tuple[Stage, ...]  # the stage as each attempt has it
    members: tuple[str, ...]  # of every branch
    judges: tuple[str, ...]  # the members whose gates decide

    @property
    def stage(self) -> str:
        """The stage that has the attempts."""
        return self.members[0]

    def branch(self, number: int) -> dict[str, str]:
        """The members' names in one attempt, by their names as written."""
        return {member: f"{member}{SIGN}{number + 1}" for member in self.members}

    def judges_of(self, number: int) -> list[str]:
        """The evaluations that decide on one attempt."""
        return [self.branch(number)[judge] for judge in self.judges]

    @property
    def all_judges(self) -> list[str]:
        """The evaluations that decide on any attempt."""
        return [judge for number in range(len(self.tries)) for judge in self.judges_of(number)]

    def told(self, number: int) -> str:
        """What an attempt changes, in short: `r = 4, schedule.learning_rate = 0.001`."""
        return ", ".join(f"{name} = {shown(value)}" for name, value in _leaves(self.changes[number])) or "as written"


def changes_of(kind: type[Stage], attempts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The attempts as tables over a stage of this kind: a field that only one of its tables has may be named without it, as
    `learning_rate` for `schedule.learning_rate`.
    """
    return [_with_tables(kind, attempt) for attempt in attempts]


def _with_tables(kind: type[Stage], attempt: Mapping[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = {}
    for key, value in attempt.items():
        annotations = {name: field.annotation for name, field in kind.model_fields.items()}
        holders = [
            name
            for name, table in annotations.items()
            if isinstance(table, type) and issubclass(table, BaseModel) and key in table.model_fields
        ]
        nested = key not in annotations and key != "kind" and len(holders) == 1
        full = merged(full, {holders[0]: {key: value}} if nested else {key: value})
    return full


def branches(stages: Mapping[str, Stage], stage: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The stages from one with attempts to the gates behind it, itself first, and those of them that have gates."""
    above = {name: ancestors(inputs_of(stages), name) for name in stages}
    judges = tuple(name for name in stages if stages[name].judged and (stage == name or stage in above[name]))
    between = [
        name for name in stages if stage in above[name] and (name in judges or any(name in above[judge] for judge in judges))
    ]
    return (stage, *between), judges


def expand(
    written: Mapping[str, Stage], families: Mapping[str, Attempts], standing: Mapping[str, int] | None = None
) -> dict[str, Stage]:
    """Ordinary stages: the branches of every attempt, and stages behind them that read the attempt which is `standing` (by
    the stage that has the attempts; the first attempt where nothing is said).
    """
    attempted = {member: family for family in families.values() for member in family.members}
    stands = {
        member: name
        for family in families.values()
        for member, name in family.branch((standing or {}).get(family.stage, 0)).items()
    }
    stages: dict[str, Stage] = {}
    for name, stage in written.items():
        family = attempted.get(name)
        if family is None:
            stages[name] = renamed(stage, stands)
        elif f"{name}{SIGN}1" not in stages:  # a whole family stands where its first member is written
            for number, attempt in enumerate(family.tries):
                branch = family.branch(number)
                for member in sorted(family.members, key=list(written).index):
                    stages[branch[member]] = renamed(
                        attempt if member == family.stage else written[member], {**stands, **branch}
                    )
    attempts = {
        branch[family.stage] for family in families.values() for branch in map(family.branch, range(len(family.tries)))
    }
    parts: dict[str, Stage] = {}
    for name, stage in stages.items():
        parts |= {name: stage} if name in attempts else stage.parted(name, stages)
    return parts


def sources(stages: Mapping[str, Stage], families: Mapping[str, Attempts]) -> dict[str, list[str]]:
    """What comes before each stage: what it names; before an attempt, what judges the one before it; and before a stage
    that reads from a branch, what judges all of them.
    """
    found = sources_of(stages)
    for family in families.values():
        places = {name: number for number in range(len(family.tries)) for name in family.branch(number).values()}
        for name in stages:
            if name in places:
                before = family.judges_of(places[name] - 1) if places[name] else []
            else:
                before = family.all_judges if any(source in places for source in found[name]) else []
            found[name] = list(dict.fromkeys([*found[name], *before]))
    return found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
