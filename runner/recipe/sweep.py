"""Sweeps: the table `[sweep]` of a recipe, and how it becomes branches (`runner.recipe.branches`).

    [sweep]
    highest = "after.section.macro_f1"
    "stage.medical.r" = [4, 8, 16]
    "stage.medical.alpha" = [16, 32]

makes a branch for each of the six settings: the stage that varies, and every stage from there to the evaluation `after`.
Stages that settings have in common exist once. All settings run, and the stages behind read the one with the best score among
those whose gates hold, of equals the first; in the order of settings the last field changes fastest.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from runner.graph import ancestors, find_cycle, plain, sources_of
from runner.recipe.branches import SEPARATOR, Axis, Branches, Sweep, expand, nested_change, predecessors
from runner.recipe.toml import leaves, merged, nested
from runner.recipe.validation import listed, models_in, nearest, shown, validated
from runner.stage import Execution, Identity, Parallel, Spec, Stage

MAX_SETTINGS = 256  # each is several stages, and a recipe from a stranger must not ask for millions
VALUES: JsonDict = {"type": "array", "minItems": 1}

Filled = Callable[[type[Stage], dict[str, Any]], dict[str, Any]]  # the fields of a stage with the defaults from the head


class SweepTable(Spec):
    """Settings to compare. All of them run, and the stages behind use the best. Each field that varies is written as
    "stage.NAME.FIELD" = [values]; several fields make a grid."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {r"^stage\..+\..+$": VALUES}})

    highest: Execution[str | None] = None
    """The score that decides, as `STAGE.TASK.METRIC` of an evaluation, if the highest is the best."""
    lowest: Execution[str | None] = None
    """The score that decides, if the lowest is the best."""
    stage: Execution[dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """The fields that vary as tables: [sweep.stage.NAME] with FIELD = [values]."""

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
    """The sweep of `table` over valid `stages`, or None after adding its faults.

    `written` has the tables of the stages, `broken` the names of those with faults; `families` are the attempts.
    """
    axes = list(_axes(table, stages, written, broken, faults))
    judge, score = _judge(table, stages, broken, faults)
    for axis, other in itertools.permutations(axes, 2):
        if axis.stage == other.stage and axis.path == other.path[: len(axis.path)]:
            faults.append(f"sweep.stage.{other}: expected a field outside of {axis}, which varies too, got one inside it")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_SETTINGS:
        faults.append(f"sweep: expected at most {MAX_SETTINGS} settings, got {count}")
    if count > MAX_SETTINGS or not axes:
        return None
    choices = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    variants = _Variants(axes, stages, written, filled, parallel)
    changed = [variants.of(choice) for choice in choices]
    faults.extend(variants.faults())
    if faults or judge is None:
        return None
    faults.extend(variants.redundant())
    sweep = Sweep(
        changes=tuple(variants.changes(choice) for choice in choices),
        changed=tuple(changed),
        names=tuple(_names(axes, choices, stages, changed, judge, faults)),
        judges=(judge,),
        axes=tuple(axes),
        choices=tuple(choices),
        score=score,
        highest=table.highest is not None,
    )
    faults.extend(_faults_among(sweep, stages, families))
    if not faults:
        everything = {**families, sweep.stage: sweep}
        if cycle := find_cycle(predecessors(expand(stages, everything), everything)):
            faults.append(f"sweep: expected stages without a cycle, got {' -> '.join(cycle)}")
    return None if faults else sweep


def resolved_sweep(sweep: Sweep, *, tables: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The sweep as a table of a recipe, with the values from the `tables` of the changed stages of each setting."""
    stage: dict[str, Any] = {}
    for place, axis in enumerate(sweep.axes):
        numbers = [next(n for n, choice in enumerate(sweep.choices) if choice[place] == i) for i in range(len(axis.values))]
        below = stage
        for part in (axis.stage, *axis.path[:-1]):
            below = below.setdefault(part, {})
        below[axis.path[-1]] = [reduce(getitem, axis.path, tables[number][axis.stage]) for number in numbers]
    return {"highest" if sweep.highest else "lowest": f"{sweep.judges[0]}.{sweep.score}", "stage": stage}


# The fields that vary


def _axes(
    table: SweepTable, stages: Mapping[str, Stage], written: Mapping[str, Any], broken: AbstractSet[str], faults: list[str]
) -> Iterator[Axis]:
    """The fields that vary, in the order in which they are written."""
    if not table.stage:
        faults.append('sweep: expected at least one field to vary, as "stage.NAME.FIELD" = [values], got none')
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
        for path, values in leaves(fields):
            if path[0] in ("kind", "attempts"):
                faults.append(f"{place}.{path[0]}: expected it outside of the sweep, since it is the same in all settings")
            elif not isinstance(values, list):
                faults.append(f"{place}.{'.'.join(path)}: expected a list of values, got {shown(values)}")
            elif not values:
                faults.append(f"{place}.{'.'.join(path)}: expected at least one value, got []")
            else:
                top = next(iter(_tables(type(stages[name]), path, values[0])))
                yield Axis(name, path if top == path[0] else (top, *path), tuple(values))


def _tables(kind: type[Stage], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A value at `path` as a table over a stage of this kind."""
    return nested_change(kind, nested(path, value))


@dataclass
class _Variants:
    """The stages that vary in each setting, and their faults."""

    axes: Sequence[Axis]
    stages: Mapping[str, Stage]
    written: Mapping[str, Any]
    filled: Filled
    parallel: Parallel
    validated: dict[tuple[str, tuple[int, ...]], Stage | None] = field(default_factory=dict)  # by stage and its values
    of_values: dict[tuple[str, str], dict[int, None]] = field(default_factory=dict)  # by place and fault, the values with it
    of_settings: dict[str, None] = field(default_factory=dict)  # faults that belong to no single field

    def changes(self, choice: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The fields that a setting changes, by stage."""
        tables: dict[str, dict[str, Any]] = {}
        for axis, index in zip(self.axes, choice, strict=True):
            change = _tables(type(self.stages[axis.stage]), axis.path, axis.values[index])
            tables[axis.stage] = merged(tables.get(axis.stage, {}), change)
        return tables

    def of(self, choice: Sequence[int]) -> dict[str, Stage]:
        """The stages that a setting changes, without those that are not valid."""
        found = {}
        for name, change in self.changes(choice).items():
            mine = tuple(index for axis, index in zip(self.axes, choice, strict=True) if axis.stage == name)
            if (name, mine) not in self.validated:
                self.validated[name, mine] = self._validated(name, change, choice)
            if stage := self.validated[name, mine]:
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
                self.of_values.setdefault((str(axis), rest), {})[index] = None
                return
            if " is not known here" in fault and f"{axis.field}.".startswith(f"{fault.partition(':')[0]}."):
                self.of_values.setdefault((f"{name}.{fault.partition(':')[0]}", f":{fault.partition(':')[2]}"), {})
                return
        setting = ", ".join(f"{axis.field} = {shown(axis.values[index])}" for axis, index in mine)
        self.of_settings[f"sweep.stage.{name}: with {setting}: {fault}"] = None

    def faults(self) -> Iterator[str]:
        """Each fault once, with the place of the value that has it, or of the field if all its values have it."""
        lengths = {str(axis): len(axis.values) for axis in self.axes}
        for (place, rest), indices in self.of_values.items():
            if rest.startswith(": is not known here") or len(indices) == lengths.get(place, 0) > 1:
                yield f"sweep.stage.{place}{rest}"
            else:
                yield from (f"sweep.stage.{place}[{index}]{rest}" for index in indices)
        yield from self.of_settings

    def redundant(self) -> Iterator[str]:
        """The faults of values that change no result, or give the same result as another value of the field."""
        for place, axis in enumerate(self.axes):
            others = [0] * len(self.axes)
            kind, seen = type(self.stages[axis.stage]), dict[int, Any]()
            base = _own_identity(self.stages[axis.stage])
            for index in range(len(axis.values)):
                own = _own_identity(self.of([*others[:place], index, *others[place + 1 :]])[axis.stage])
                same = next((other for other, identity in seen.items() if identity == own), None)
                seen[index] = own
                if _is_execution(kind, axis.path) and own == base:
                    yield (
                        f"sweep.stage.{axis}: expected a field that decides the result; this one only says how or where it is "
                        "computed"
                    )
                    break
                if same is not None:
                    values = f"{shown(axis.values[same])} and {shown(axis.values[index])}"
                    yield f"sweep.stage.{axis}[{index}]: expected values that give different results, got {values}"


def _own_identity(stage: Stage) -> Any:
    """What decides the result of a stage, apart from the content of its inputs."""
    return plain(stage, file=lambda file: file.pattern, semantic_only=True), dict(stage.extra_identity())


def _is_execution(kind: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a field, or a table around it, is marked as Execution."""
    models: list[type[BaseModel]] = [kind]
    for part in path:
        infos = [model.model_fields[part] for model in models if part in model.model_fields]
        if any(Identity.EXECUTION in info.metadata for info in infos):
            return True
        models = [model for info in infos for model in models_in(info.annotation)]
    return False


# The score that decides


def _judge(
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
        choices = f"one of {listed(known)}" if known else "the score of an evaluation, but no stage evaluates"
        faults.append(f"sweep.{place}: expected {choices}, got {shown(named)}{nearest(named, known)}")
    return None, ""


# The graph


def _names(
    axes: Sequence[Axis],
    choices: Sequence[tuple[int, ...]],
    stages: Mapping[str, Stage],
    changed: Sequence[Mapping[str, Stage]],
    judge: str,
    faults: list[str],
) -> Iterator[dict[str, str]]:
    """The names of the stages of each setting: those that vary, and those from there to `judge`.

    A stage that several settings have in common has the number of the first of them.
    """
    varied = list(dict.fromkeys(axis.stage for axis in axes))
    before, readers = _neighbours(stages, changed)
    behind = {name: ancestors(readers, name) for name in varied}
    for name in varied:
        if judge not in behind[name]:
            faults.append(f"sweep.stage.{name}: expected a stage before {judge!r}, whose score decides, got one that is not")
    branch = {judge, *ancestors(before, judge)} & {*varied, *(name for names in behind.values() for name in names)}
    members = [*varied, *(name for name in stages if name in branch and name not in varied)]
    axes_of = {
        name: [place for place, axis in enumerate(axes) if name == axis.stage or name in behind[axis.stage]]
        for name in members
    }
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    for number, choice in enumerate(choices):
        yield {
            name: f"{name}{SEPARATOR}{first.setdefault((name, tuple(choice[place] for place in axes_of[name])), number) + 1}"
            for name in members
        }


def _neighbours(
    stages: Mapping[str, Stage], changed: Sequence[Mapping[str, Stage]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The stages right before and right behind each stage in any setting."""
    before = sources_of(stages)
    for name, stage in {id(stage): (name, stage) for setting in changed for name, stage in setting.items()}.values():
        before[name] += [source for source in sources_of({name: stage})[name] if source in stages]
    return before, {name: [reader for reader, sources in before.items() if name in sources] for name in stages}


def _faults_among(sweep: Sweep, stages: Mapping[str, Stage], families: Mapping[str, Branches]) -> Iterator[str]:
    """Stages that are in the branches of attempts too, and names that are taken."""
    for family in families.values():
        if common := sorted(sweep.members & family.members):
            yield f"sweep: expected no stage that attempts of {family.stage!r} run too, got {listed(common)}"
    for taken in sorted(sweep.numbers.keys() & stages.keys()):
        yield f"stage.{taken}: expected another name; a setting of the sweep has this one"
