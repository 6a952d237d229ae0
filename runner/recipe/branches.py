"""The expansion of a recipe into ordinary stages, before anything is planned.

    attempts = [{ r = 8 }, { r = 4, learning_rate = 1e-3 }]

on the stage `medical` makes a branch for each attempt: `medical@1`, `medical@2`, with every stage between it and the gates
behind it (`release@1`, `after@1`, ...). A stage behind the branches reads the selected one: of attempts the first that has not
failed its gates, of a sweep (`runner.recipe.sweep`) the setting with the best score. `runner.planning.plan` chooses, and lets
an attempt run only after the one before it failed; here are pure functions over stages. Names are not part of any key.

Finally, stages that are split into several (`Stage.expanded`) are replaced by those: a pretraining with a "wsd" schedule by
its trunk and the rest. In a branch they stay whole, since the trunks of attempts that are never needed would be trained.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from runner.graph import ancestors, inputs_of, renamed, sources_of
from runner.recipe.toml import leaves, merged
from runner.recipe.validation import shown
from runner.stage import Stage

SEPARATOR = "@"  # between the name of a stage and the number of its branch, which counts from 1


@dataclass(frozen=True)
class Branches:
    """Several versions of some stages, one of which is selected. Branches are counted from 0."""

    changes: tuple[Mapping[str, Mapping[str, Any]], ...]  # of each branch: by stage, the fields that it changes
    changed: tuple[Mapping[str, Stage], ...]  # of each branch: the stages with these changes
    names: tuple[Mapping[str, str], ...]  # of each branch: the names of its stages, by their names as written
    judges: tuple[str, ...]  # the evaluations that decide, by their names as written

    @property
    def stage(self) -> str:
        """The first stage that changes, the key of these branches among others."""
        return next(iter(self.changed[0]))

    @cached_property
    def members(self) -> frozenset[str]:
        """The stages of every branch, as written."""
        return frozenset(self.names[0])

    @cached_property
    def numbers(self) -> Mapping[str, Sequence[int]]:
        """The numbers of the branches that each stage is in, by its name there."""
        found: dict[str, list[int]] = {}
        for number, branch in enumerate(self.names):
            for name in branch.values():
                found.setdefault(name, []).append(number)
        return found

    @cached_property
    def all_judges(self) -> list[str]:
        """The evaluations that decide, of all branches."""
        return [judge for number in range(len(self.names)) for judge in self.judges_of(number)]

    def judges_of(self, number: int) -> list[str]:
        """The evaluations that decide, of one branch."""
        return [self.names[number][judge] for judge in self.judges]

    def awaited(self, number: int) -> list[str]:
        """The evaluations that finish before a branch starts."""
        return []

    def describe(self, number: int) -> str:
        """The changes of a branch as a short text."""
        raise NotImplementedError

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """The number of the selected branch, and whether the choice is final, from whether the gates of each branch hold (None
        while unknown) and from its score.
        """
        raise NotImplementedError


class Attempts(Branches):
    """The attempts of one stage: each runs after the one before it failed, and the first that passes is selected."""

    def awaited(self, number: int) -> list[str]:
        """The evaluations of the attempt before."""
        return self.judges_of(number - 1) if number else []

    def describe(self, number: int) -> str:
        """`r = 4, schedule.learning_rate = 0.001`."""
        changes = [(path, value) for path, value in leaves(self.changes[number][self.stage]) if value != {}]
        return ", ".join(f"{'.'.join(path)} = {shown(value)}" for path, value in changes) or "as written"

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """The first that has not failed; the last if all have."""
        number = next((number for number, passed in enumerate(outcomes) if passed is not False), len(outcomes) - 1)
        return number, outcomes[number] is True


@dataclass(frozen=True)
class Sweep(Branches):
    """The settings of a sweep: all of them run, and the one with the best score of one evaluation is selected."""

    axes: tuple["Axis", ...]
    choices: tuple[tuple[int, ...], ...]  # of each setting: the index of its value on each axis
    score: str  # of the evaluation that decides, as `section.macro_f1`
    highest: bool  # whether the highest score is the best, or the lowest

    @property
    def criterion(self) -> str:
        """`highest after.section.macro_f1`."""
        return f"{'highest' if self.highest else 'lowest'} {self.judges[0]}.{self.score}"

    def values(self, number: int) -> list[Any]:
        """The value of a setting on each axis."""
        return [axis.values[index] for axis, index in zip(self.axes, self.choices[number], strict=True)]

    def describe(self, number: int) -> str:
        """`medical.r = 4, medical.alpha = 16`."""
        return ", ".join(f"{axis} = {shown(value)}" for axis, value in zip(self.axes, self.values(number), strict=True))

    def choice(self, outcomes: Sequence[bool | None], scores: Sequence[float | None]) -> tuple[int, bool]:
        """The best of those whose gates hold, once all are judged, and the first of equals. Until then, the first setting."""

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


def branch_names(members: Iterable[str], count: int) -> tuple[dict[str, str], ...]:
    """The names of the stages in each of `count` branches."""
    return tuple({member: f"{member}{SEPARATOR}{number + 1}" for member in members} for number in range(count))


def nested_change(kind: type[Stage], change: Mapping[str, Any]) -> dict[str, Any]:
    """A change as a table over a stage of this kind: a field that only one of its tables has may be named without the table,
    as `learning_rate` for `schedule.learning_rate`.
    """
    full: dict[str, Any] = {}
    annotations = {name: field.annotation for name, field in kind.model_fields.items()}
    for key, value in change.items():
        holders = [
            name
            for name, table in annotations.items()
            if isinstance(table, type) and issubclass(table, BaseModel) and key in table.model_fields
        ]
        nested = key not in annotations and key != "kind" and len(holders) == 1
        full = merged(full, {holders[0]: {key: value}} if nested else {key: value})
    return full


def branched_stages(stages: Mapping[str, Stage], stage: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The stages from one with attempts to the gates behind it, itself first, and those of them that have gates."""
    above = {name: ancestors(inputs_of(stages), name) for name in stages}
    judges = tuple(name for name in stages if stages[name].has_gates and (stage == name or stage in above[name]))
    between = [
        name for name in stages if stage in above[name] and (name in judges or any(name in above[judge] for judge in judges))
    ]
    return (stage, *between), judges


def expand(
    written: Mapping[str, Stage], families: Mapping[str, Branches], selected: Mapping[str, int] | None = None
) -> dict[str, Stage]:
    """Ordinary stages: those of every branch, and behind them stages that read the `selected` branch of each family, by
    default the first.
    """
    owners = {member: family for family in families.values() for member in family.members}
    selected_names = {
        member: name
        for family in families.values()
        for member, name in family.names[(selected or {}).get(family.stage, 0)].items()
    }
    stages: dict[str, Stage] = {}
    for name, stage in written.items():
        family = owners.get(name)
        if family is None:
            stages[name] = renamed(stage, selected_names)
        elif family.names[0][name] not in stages:  # all branches take the place of the first member
            members = [member for member in written if member in family.members]
            for branch, changed in zip(family.names, family.changed, strict=True):
                for member in members:
                    if branch[member] not in stages:
                        stages[branch[member]] = renamed(changed.get(member, written[member]), {**selected_names, **branch})
    branched = {name for family in families.values() for name in family.numbers}
    expanded: dict[str, Stage] = {}
    for name, stage in stages.items():
        expanded |= {name: stage} if name in branched else stage.expanded(name, stages)
    return expanded


def predecessors(stages: Mapping[str, Stage], families: Mapping[str, Branches]) -> dict[str, list[str]]:
    """The stages that run before each stage: those it names, the judges of the attempt before it, and for a stage that reads
    from a branch the judges of all branches.
    """
    found = sources_of(stages)
    for family in families.values():
        numbers = family.numbers
        for name in stages:
            if name in numbers:
                before = family.awaited(numbers[name][0])
            else:
                before = family.all_judges if any(source in numbers for source in found[name]) else []
            found[name] = list(dict.fromkeys([*found[name], *before]))
    return found
