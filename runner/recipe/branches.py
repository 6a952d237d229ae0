"""The expansion of a recipe: what stands for several stages becomes ordinary stages, before anything is planned.

    attempts = [{ r = 8 }, { r = 4, learning_rate = 1e-3 }]

on the stage `medical` makes a branch of each attempt: `medical@1`, `medical@2`, and likewise every stage between it and the
gates behind it (`release@1`, `after@1`, ...). A stage behind the branches reads the one that is taken: of attempts the first
that has not failed its gates, of a sweep (`runner.recipe.sweep`) the setting with the best score. Which that is, and that an attempt
only runs once the one before it has failed, is the business of `runner.planning.plan`; here are pure functions over stages, and names
are no part of any key.

Last, a stage that stands for several (`Stage.expanded`) becomes those: a pretraining with a "wsd" schedule its trunk and what
follows. One in a branch stays whole, since trunks would be trained of attempts that are never needed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from runner.graph import ancestors, inputs_of, renamed, sources_of
from runner.recipe.toml import merged
from runner.recipe.validation import shown
from runner.stage import Stage

SIGN = "@"  # between the name of a stage and the number of its branch, from 1


@dataclass(frozen=True)
class Branches:
    """Several versions of some stages, of which one is taken. They are counted from 0."""

    changes: tuple[Mapping[str, Mapping[str, Any]], ...]  # of each branch: by stage, what it changes, as a table over it
    changed: tuple[Mapping[str, Stage], ...]  # of each branch: the stages that it changes, as it has them
    names: tuple[Mapping[str, str], ...]  # of each branch: its stages, by their names as written
    judges: tuple[str, ...]  # the evaluations in every branch that decide, as written

    @property
    def stage(self) -> str:
        """The stage by which these branches are known, since no others have it: the first that changes."""
        return next(iter(self.changed[0]))

    @cached_property
    def members(self) -> frozenset[str]:
        """The stages of every branch, as written."""
        return frozenset(self.names[0])

    @cached_property
    def places(self) -> Mapping[str, Sequence[int]]:
        """The branches that each stage is in, by its name there."""
        found: dict[str, list[int]] = {}
        for number, branch in enumerate(self.names):
            for name in branch.values():
                found.setdefault(name, []).append(number)
        return found

    @cached_property
    def all_judges(self) -> list[str]:
        """The evaluations that decide on any branch."""
        return [judge for number in range(len(self.names)) for judge in self.judges_of(number)]

    def judges_of(self, number: int) -> list[str]:
        """The evaluations that decide on one branch."""
        return [self.names[number][judge] for judge in self.judges]

    def awaited(self, number: int) -> list[str]:
        """The evaluations that are over before a branch begins."""
        return []

    def describe(self, number: int) -> str:
        """What a branch changes, in short."""
        raise NotImplementedError

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """Which branch is relied on now, and whether that is the end of it, by whether the gates of each hold (None while
        that is unknown) and by what each scored.
        """
        raise NotImplementedError


class Attempts(Branches):
    """The attempts of one stage: each runs once the one before it has failed, and the first that passes is taken."""

    def awaited(self, number: int) -> list[str]:
        """What judges the attempt before."""
        return self.judges_of(number - 1) if number else []

    def describe(self, number: int) -> str:
        """`r = 4, schedule.learning_rate = 0.001`."""
        leaves = _leaves(self.changes[number][self.stage])
        return ", ".join(f"{name} = {shown(value)}" for name, value in leaves) or "as written"

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """The first that has not failed; the last if all have."""
        number = next((number for number, passed in enumerate(outcomes) if passed is not False), len(outcomes) - 1)
        return number, outcomes[number] is True


@dataclass(frozen=True)
class Sweep(Branches):
    """The settings of a sweep: all of them run, and the best is taken, by one score of one evaluation."""

    axes: tuple["Axis", ...]
    choices: tuple[tuple[int, ...], ...]  # of each setting: which value of each axis
    score: str  # of the evaluation that decides, as `section.macro_f1`
    highest: bool  # whether the highest is the best, or the lowest

    @property
    def criterion(self) -> str:
        """`highest after.section.macro_f1`."""
        return f"{'highest' if self.highest else 'lowest'} {self.judges[0]}.{self.score}"

    def values(self, number: int) -> list[Any]:
        """What a setting has for each axis."""
        return [axis.values[index] for axis, index in zip(self.axes, self.choices[number], strict=True)]

    def describe(self, number: int) -> str:
        """`medical.r = 4, medical.alpha = 16`."""
        return ", ".join(f"{axis} = {shown(value)}" for axis, value in zip(self.axes, self.values(number), strict=True))

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """The best of those whose gates hold, once all are judged; of equals the first. The first as long as there is none."""

        def rank(number: int) -> float:
            score = scores[number]
            if score is None or math.isnan(score):
                return math.inf
            return -score if self.highest else score

        passed = [number for number, outcome in enumerate(outcomes) if outcome]
        return (min(passed, key=rank), True) if passed and None not in outcomes else (0, False)


@dataclass(frozen=True)
class Axis:
    """One field that a sweep varies."""

    stage: str
    path: tuple[str, ...]  # of the field in its stage
    values: tuple[Any, ...]

    @property
    def field(self) -> str:
        """`schedule.learning_rate`."""
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.stage}.{self.field}"


def numbered(members: Iterable[str], count: int) -> tuple[dict[str, str], ...]:
    """Names of the stages of so many branches."""
    return tuple({member: f"{member}{SIGN}{number + 1}" for member in members} for number in range(count))


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
    judges = tuple(name for name in stages if stages[name].has_gates and (stage == name or stage in above[name]))
    between = [
        name for name in stages if stage in above[name] and (name in judges or any(name in above[judge] for judge in judges))
    ]
    return (stage, *between), judges


def expand(
    written: Mapping[str, Stage], families: Mapping[str, Branches], chosen: Mapping[str, int] | None = None
) -> dict[str, Stage]:
    """Ordinary stages: those of every branch, and stages behind them that read the branch which is `chosen` (by the stage
    that names the family; the first branch where nothing is said).
    """
    owners = {member: family for family in families.values() for member in family.members}
    stands = {
        member: name
        for family in families.values()
        for member, name in family.names[(chosen or {}).get(family.stage, 0)].items()
    }
    stages: dict[str, Stage] = {}
    for name, stage in written.items():
        family = owners.get(name)
        if family is None:
            stages[name] = renamed(stage, stands)
        elif family.names[0][name] not in stages:  # a whole family stands where its first member is written
            members = [member for member in written if member in family.members]
            for branch, changed in zip(family.names, family.changed, strict=True):
                for member in members:
                    if branch[member] not in stages:
                        stages[branch[member]] = renamed(changed.get(member, written[member]), {**stands, **branch})
    branched = {name for family in families.values() for name in family.places}
    parts: dict[str, Stage] = {}
    for name, stage in stages.items():
        parts |= {name: stage} if name in branched else stage.expanded(name, stages)
    return parts


def sources(stages: Mapping[str, Stage], families: Mapping[str, Branches]) -> dict[str, list[str]]:
    """What comes before each stage: what it names; before an attempt, what judges the one before it; and before a stage
    that reads from a branch, what judges all of them.
    """
    found = sources_of(stages)
    for family in families.values():
        places = family.places
        for name in stages:
            if name in places:
                before = family.awaited(places[name][0])
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
