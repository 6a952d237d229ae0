"""Sweeps: the table `[sweep]` of a recipe, and how it becomes branches (`runner.recipe.branches`).

    [sweep]
    highest = "after.section.macro_f1"
    "stage.medical.r" = [4, 8, 16]
    "stage.medical.alpha" = [16, 32]

makes a branch of each of the six settings: what varies, and every stage from there to the evaluation `after`. What settings
have in common is there once. All of them run, and whatever stands behind takes the one with the best score among those whose
gates hold; of equals the first as written, where the last field changes fastest.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from runner.graph import ancestors, find_cycle, plain, sources_of
from runner.recipe.branches import SIGN, Axis, Branches, Sweep, changes_of, expand, sources
from runner.recipe.toml import merged
from runner.recipe.validation import listed, models_in, nearest, shown, validated
from runner.stage import Execution, Identity, Parallel, Spec, Stage

MOST = 256  # settings of a sweep; each is several stages, and a recipe from a stranger must not ask for millions
VALUES: JsonDict = {"type": "array", "minItems": 1}

Filled = Callable[[type[Stage], dict[str, Any]], dict[str, Any]]  # the fields of a stage with what the head says for all


class SweepTable(Spec):
    """Settings to compare, all of which run; what follows takes the best. A field that varies stands here as
    "stage.NAME.FIELD" = [its values]; several make a grid."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {r"^stage\..+\..+$": VALUES}})

    highest: Execution[str | None] = None
    """The score that decides, as `STAGE.TASK.METRIC` of an evaluation; the highest is the best."""
    lowest: Execution[str | None] = None
    """The same for a score whose lowest value is the best."""
    stage: Execution[dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """The same fields as tables: [sweep.stage.NAME] with FIELD = [its values]."""

    @model_validator(mode="after")
    def _one_score(self) -> Self:
        named = [name for name in ("highest", "lowest") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"expected exactly one of highest and lowest, got {' and '.join(named) or 'neither'}")
        return self


def read_sweep(
    table: SweepTable,
    stages: Mapping[str, Stage],
    written: Mapping[str, Any],
    *,
    broken: AbstractSet[str],
    filled: Filled,
    parallel: Parallel,
    families: Mapping[str, Branches],
    faults: list[str],
) -> Sweep | None:
    """The sweep that `table` asks for among valid `stages`, or None after adding its faults.

    `written` are their tables, and `broken` the names of those that have faults of their own; `families` are the attempts.
    """
    axes = list(_axes(table, stages, written, broken, faults))
    judge, score = _deciding(table, stages, broken, faults)
    for axis, other in itertools.permutations(axes, 2):
        if axis.stage == other.stage and axis.path == other.path[: len(axis.path)]:
            faults.append(f"sweep.stage.{other}: expected a field of its own; {axis} varies too")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST:
        faults.append(f"sweep: expected at most {MOST} settings, got {count}")
    if count > MOST or not axes:
        return None
    choices = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    variants = _Variants(axes, stages, written, filled, parallel)
    changed = [variants.of(choice) for choice in choices]
    faults.extend(variants.faults())
    if faults or judge is None:
        return None
    faults.extend(variants.idle())
    varied = list(dict.fromkeys(axis.stage for axis in axes))
    before, readers = _neighbours(stages, changed)
    behind = {name: ancestors(readers, name) for name in varied}
    for name in varied:
        if judge not in behind[name]:
            faults.append(f"sweep.stage.{name}: expected a stage before {judge!r}, whose score decides, got one that is not")
    branch = {judge, *ancestors(before, judge)} & {*varied, *(name for names in behind.values() for name in names)}
    members = [*varied, *(name for name in stages if name in branch and name not in varied)]
    for family in families.values():
        if common := sorted({*members} & family.members):
            faults.append(f"sweep: expected no stage that attempts of {family.stage!r} run too, got {listed(common)}")
    sweep = Sweep(
        changes=tuple(variants.changes(choice) for choice in choices),
        changed=tuple(changed),
        names=tuple(_names(members, axes, behind, choices)),
        judges=(judge,),
        axes=tuple(axes),
        choices=tuple(choices),
        score=score,
        highest=table.highest is not None,
    )
    for taken in sorted(sweep.places.keys() & stages.keys()):
        faults.append(f"stage.{taken}: expected another name; a setting of the sweep has this one")
    if not faults:
        everything = {**families, sweep.stage: sweep}
        if cycle := find_cycle(sources(expand(stages, everything), everything)):
            faults.append(f"sweep: expected stages without a cycle, got {' -> '.join(cycle)}")
    return None if faults else sweep


def resolved(sweep: Sweep, *, tables: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The sweep as a recipe holds it, with the values as they are in the `tables` of the stages of each setting."""
    stage: dict[str, Any] = {}
    for place, axis in enumerate(sweep.axes):
        numbers = [next(n for n, choice in enumerate(sweep.choices) if choice[place] == i) for i in range(len(axis.values))]
        below = stage.setdefault(axis.stage, {})
        for part in axis.path[:-1]:
            below = below.setdefault(part, {})
        below[axis.path[-1]] = [_at(tables[number][axis.stage], axis.path) for number in numbers]
    return {"highest" if sweep.highest else "lowest": f"{sweep.judges[0]}.{sweep.score}", "stage": stage}


# What varies


def _axes(
    table: SweepTable,
    stages: Mapping[str, Stage],
    written: Mapping[str, Any],
    broken: AbstractSet[str],
    faults: list[str],
) -> Iterator[Axis]:
    """The fields that vary, in the order in which they are written."""
    if not table.stage:
        faults.append('sweep: expected at least one field to vary, as "stage.NAME.FIELD" = [its values], got none')
    known = [name for name in written if name in stages]
    for name, fields in table.stage.items():
        place = f"sweep.stage.{name}"
        if name in broken:
            continue
        if name not in known:
            faults.append(f"{place}: expected the name of a stage, got {name!r}{nearest(name, [*known, *broken])}")
            continue
        if not fields:
            faults.append(f"{place}: expected at least one field with a list of values, got none")
        for path, values in _lists(fields):
            if path[0] in ("kind", "attempts"):
                faults.append(f"{place}.{path[0]}: is the same in all settings; expected it outside of them")
            elif not isinstance(values, list):
                faults.append(f"{place}.{'.'.join(path)}: expected a list of values, got {shown(values)}")
            elif not values:
                faults.append(f"{place}.{'.'.join(path)}: expected at least one value, got []")
            else:
                top = next(iter(_tables(type(stages[name]), path, values[0])))
                yield Axis(name, path if top == path[0] else (top, *path), tuple(values))


def _lists(fields: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What stands in tables, with its path; an empty table is a value that is no list."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _lists(value, (*path, key))
        else:
            yield (*path, key), value


def _tables(kind: type[Stage], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A value at `path` as a table over a stage of this kind."""
    for part in reversed(path[1:]):
        value = {part: value}
    return changes_of(kind, [{path[0]: value}])[0]


@dataclass
class _Variants:
    """The stages that vary, as each setting has them, and what is wrong with them."""

    axes: Sequence[Axis]
    stages: Mapping[str, Stage]
    written: Mapping[str, Any]
    filled: Filled
    parallel: Parallel
    made: dict[tuple[str, tuple[int, ...]], Stage | None] = field(default_factory=dict)
    found: dict[tuple[str, str], dict[int, None]] = field(default_factory=dict)  # by place and fault, the values that have it
    rest: dict[str, None] = field(default_factory=dict)  # faults that belong to no single field

    def changes(self, choice: Sequence[int]) -> dict[str, dict[str, Any]]:
        """What a setting changes, by stage."""
        tables: dict[str, dict[str, Any]] = {}
        for axis, index in zip(self.axes, choice, strict=True):
            change = _tables(type(self.stages[axis.stage]), axis.path, axis.values[index])
            tables[axis.stage] = merged(tables.get(axis.stage, {}), change)
        return tables

    def of(self, choice: Sequence[int]) -> dict[str, Stage]:
        """The stages that a setting changes, as far as they are valid."""
        found = {}
        for name, change in self.changes(choice).items():
            mine = tuple(index for axis, index in zip(self.axes, choice, strict=True) if axis.stage == name)
            if (name, mine) not in self.made:
                self.made[name, mine] = self._validated(name, change, choice)
            if stage := self.made[name, mine]:
                found[name] = stage
        return found

    def _validated(self, name: str, change: dict[str, Any], choice: Sequence[int]) -> Stage | None:
        kind = type(self.stages[name])
        fields = {key: value for key, value in self.written[name].items() if key not in ("kind", "attempts")}
        faults: list[str] = []
        stage = validated(kind, self.filled(kind, merged(fields, change)), "", faults)
        if stage and (fault := stage.parallel_fault(self.parallel)) and not self.stages[name].parallel_fault(self.parallel):
            faults.append(fault)
        for fault in faults:
            self._note(name, fault.removeprefix(": "), choice)
        return stage

    def _note(self, name: str, fault: str, choice: Sequence[int]) -> None:
        mine = [(axis, index) for axis, index in zip(self.axes, choice, strict=True) if axis.stage == name]
        for axis, index in mine:
            if fault.startswith((f"{axis.field}: ", f"{axis.field}.", f"{axis.field}[")):
                rest = fault.removeprefix(axis.field)
                self.found.setdefault((str(axis), rest), {})[index] = None
                return
            if " is not known here" in fault and f"{axis.field}.".startswith(f"{fault.partition(':')[0]}."):
                self.found.setdefault((f"{name}.{fault.partition(':')[0]}", f":{fault.partition(':')[2]}"), {})
                return
        told = ", ".join(f"{axis.field} = {shown(axis.values[index])}" for axis, index in mine)
        self.rest[f"sweep.stage.{name}: with {told}: {fault}"] = None

    def faults(self) -> Iterator[str]:
        """Each fault once, with the place of the value that has it; of the field where all its values have it."""
        lengths = {str(axis): len(axis.values) for axis in self.axes}
        for (place, rest), indices in self.found.items():
            if rest.startswith(": is not known here") or len(indices) == lengths.get(place, 0) > 1:
                yield f"sweep.stage.{place}{rest}"
            else:
                yield from (f"sweep.stage.{place}[{index}]{rest}" for index in indices)
        yield from self.rest

    def idle(self) -> Iterator[str]:
        """Values that change nothing that is learned, alone or beside another of the same field."""
        for place, axis in enumerate(self.axes):
            others = [0] * len(self.axes)
            kind, seen = type(self.stages[axis.stage]), dict[int, Any]()
            base = _learned(self.stages[axis.stage])
            for index in range(len(axis.values)):
                learned = _learned(self.of([*others[:place], index, *others[place + 1 :]])[axis.stage])
                same = next((other for other, theirs in seen.items() if theirs == learned), None)
                seen[index] = learned
                if _is_execution(kind, axis.path) and learned == base:
                    yield (
                        f"sweep.stage.{axis}: expected a field that decides what is learned; this one only says how "
                        "or where it is computed"
                    )
                    break
                if same is not None:
                    values = f"{shown(axis.values[same])} and {shown(axis.values[index])}"
                    yield f"sweep.stage.{axis}[{index}]: expected values that differ in what is learned, got {values}"


def _learned(stage: Stage) -> Any:
    """What decides the result of a stage, apart from the content of its inputs."""
    return plain(stage, file=lambda file: file.pattern, semantic_only=True), dict(stage.extra_identity())


def _is_execution(kind: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a field, or a table around it, is marked as no part of the key."""
    models: list[type[BaseModel]] = [kind]
    for part in path:
        infos = [model.model_fields[part] for model in models if part in model.model_fields]
        if any(Identity.EXECUTION in info.metadata for info in infos):
            return True
        models = [model for info in infos for model in models_in(info.annotation)]
    return False


# What decides


def _deciding(
    table: SweepTable, stages: Mapping[str, Stage], broken: AbstractSet[str], faults: list[str]
) -> tuple[str | None, str]:
    """The evaluation whose score decides, and that score."""
    named, place = (table.highest, "highest") if table.highest is not None else (str(table.lowest), "lowest")
    known = {f"{name}.{score}": (name, score) for name, stage in stages.items() for score in stage.score_names}
    if named in known and not named.endswith("."):
        return known[named]
    for beginning, (name, _) in known.items():
        if beginning.endswith(".") and named.startswith(beginning) and named != beginning:
            return name, named.removeprefix(f"{name}.")
    if not any(named.startswith(f"{name}.") for name in broken):
        choices = f"one of {listed(known)}" if known else "an evaluation, of which there is none"
        faults.append(f"sweep.{place}: expected {choices}, got {shown(named)}{nearest(named, known)}")
    return None, ""


# The graph


def _neighbours(
    stages: Mapping[str, Stage], changed: Sequence[Mapping[str, Stage]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What comes right before and right behind each stage in any setting."""
    before = sources_of(stages)
    for name, stage in {id(stage): (name, stage) for setting in changed for name, stage in setting.items()}.values():
        before[name] += [source for source in sources_of({name: stage})[name] if source in stages]
    behind: dict[str, list[str]] = {name: [] for name in stages}
    for name, sources_of_it in before.items():
        for source in sources_of_it:
            behind[source].append(name)
    return before, behind


def _names(
    members: Sequence[str],
    axes: Sequence[Axis],
    behind: Mapping[str, AbstractSet[str]],
    choices: Sequence[tuple[int, ...]],
) -> Iterator[dict[str, str]]:
    """The names of the stages of each setting. Where settings have a stage in common, it is numbered by the first of them."""
    decides = {
        name: [place for place, axis in enumerate(axes) if name == axis.stage or name in behind[axis.stage]]
        for name in members
    }
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    for number, choice in enumerate(choices):
        yield {
            name: f"{name}{SIGN}{first.setdefault((name, tuple(choice[place] for place in decides[name])), number) + 1}"
            for name in members
        }


def _at(table: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = table
    for part in path:
        value = value[part]
    return value
