"""TOML to Recipe: reads the file and those it extends, validates everything, and reports all faults at once.

Planning and running start from a Recipe, so nothing else checks fields again. `runner.recipe.toml` reads and merges files,
`runner.recipe.validation` writes the messages.
"""

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from runner.cache.remote import address_fault, is_local, local_folder
from runner.errors import RecipeError
from runner.graph import ancestors, edges, find_cycle, in_order, input_files, plain, sources_of
from runner.input_files import AllowedFolders, InputFile, Located, split_pattern
from runner.recipe.branches import (
    Attempts,
    Branches,
    Sweep,
    branch_names,
    branched_stages,
    expand,
    nested_change,
    predecessors,
)
from runner.recipe.head import Head
from runner.recipe.sweep import Filled, read_sweep, resolved_sweep
from runner.recipe.toml import apply_override, merged, read_with_parents
from runner.recipe.validation import listed, nearest, shown, validated
from runner.stage import NAME, Parallel, Stage
from runner.stages import stage_kinds

USER_TABLES = ("cache", "parallel", "tracking")  # of those, a release has none


@dataclass(frozen=True)
class Recipe:
    """A valid recipe: stages by name, in the order in which they are written."""

    path: Path
    head: Head
    written: Mapping[str, Stage]
    overrides: tuple[str, ...]  # of --set, applied already; without addresses of notices
    families: Mapping[str, Branches]  # attempts and sweep, by the stage that names them; each before those that read from it

    @cached_property
    def stages(self) -> Mapping[str, Stage]:
        """Ordinary stages, including those of every branch; what reads from branches reads the first."""
        return expand(self.written, self.families)

    def with_branches(self, selected: Mapping[str, int]) -> Mapping[str, Stage]:
        """The stages, where what reads from branches reads the `selected` one of each family."""
        return expand(self.written, self.families, selected)

    @property
    def sweep(self) -> Sweep | None:
        """Its sweep, if it has one."""
        return next((family for family in self.families.values() if isinstance(family, Sweep)), None)

    def family_of(self, name: str) -> Branches | None:
        """The branches that a stage belongs to, by its name as written."""
        return next((family for family in self.families.values() if name in family.members), None)

    def names_of(self, name: str) -> list[str]:
        """The names of a written stage in its branches, or its own name if it has none."""
        family = self.family_of(name)
        return [name] if family is None else list(dict.fromkeys(branch[name] for branch in family.names))

    def needed(self, name: str) -> set[str]:
        """The stages that a run until `name` may run; if it is branched, all its branches and their evaluations."""
        family = self.family_of(name)
        names = [*self.names_of(name), *(family.all_judges if family else ())]
        return {*names, *ancestors(predecessors(self.stages, self.families), *names)}

    def resolved(self, selected: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The whole recipe with its defaults, ready for TOML; file names are relative to the recipe's folder.

        With `selected`, each family is replaced by that one of its branches, as if it alone had been written.
        """

        def table(name: str, stage: Stage) -> dict[str, Any]:
            family = self.family_of(name)
            if selected is not None and family is not None:
                stage = family.changed[selected[family.stage]].get(name, stage)
            fields = {"kind": stage.kind, **self.fields_of(stage)}
            if selected is None and isinstance(family, Attempts) and name == family.stage:
                attempts = [self.fields_of(changed[name]) for changed in family.changed]
                pairs = zip(family.changes, attempts, strict=True)
                fields["attempts"] = [{key: attempt[key] for key in change[name]} for change, attempt in pairs]
            return fields

        stages = {name: table(name, stage) for name, stage in self.written.items()}
        head = plain(self.head)
        del head["alerts"]["notify"]
        if (sweep := self.sweep) is not None:
            if selected is None:
                tables = [{n: self.fields_of(s) for n, s in changed.items()} for changed in sweep.changed]
                head["sweep"] = resolved_sweep(sweep, tables=tables)
            else:
                del head["sweep"]
        return {**head, "stage": stages}

    def fields_of(self, stage: Stage) -> dict[str, Any]:
        """The fields of a stage as plain data, with its defaults; file names are relative to the recipe's folder."""
        folder = self.path.parent.resolve()

        def relative(file: InputFile) -> str:
            if file.hub or Path(file).is_absolute():
                return str(file)
            return os.path.relpath(file.folder / file, folder)

        return dict(plain(stage, file=relative))

    def published(self, selected: Mapping[str, int]) -> dict[str, Any]:
        """The resolved recipe for a release, without what whoever runs it decides: the cache, the processes and machines, the
        trackers, and where it is pushed.
        """
        recipe = self.resolved(selected)
        stages = {
            name: {field: value for field, value in table.items() if field not in self.written[name].user_fields}
            for name, table in recipe["stage"].items()
        }
        return {name: value for name, value in recipe.items() if name not in USER_TABLES} | {"stage": stages}


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, allowed: Sequence[Path] = (), absent: Container[str] = ()
) -> Recipe:
    """The recipe at `path` with `overrides` ("stage.base.seed=1") applied; RecipeError lists every fault.

    All files that it names have to lie in its own folder or in one that is `allowed`. Input files at the paths `absent` may be
    missing: their digests are known, and results that were made from them may be in the cache.
    """
    folders = AllowedFolders(path.resolve().parent, tuple(allowed))
    table = read_with_parents(path, (), folders)
    for override in overrides:
        _check_key(override, table)
        apply_override(table, override, path)
    faults = list(_place_remote(table, folders))
    tables = table.pop("stage", None)
    head = validated(Head, table, "", faults)
    if not isinstance(tables, dict) or not tables:
        faults.append("stage: expected at least one [stage.NAME] table, got none")
        tables = {}
    alerts = {key: value for key, value in table.get("alerts", {}).items() if key != "notify"} if head else {}
    filled = partial(_filled, head.seed if head else 0, alerts)
    faults.extend(
        f"stage.{shown(name)}: expected a name of at most 100 letters, digits and _.-, which begins with a letter or digit"
        for name in tables
        if re.fullmatch(NAME, re.sub(r"@\d{1,3}$", "", name)) is None  # the name of a branch is refused where it is taken
    )
    found = {name: _validated_stage(name, tables, filled, faults) for name in tables}
    stages = {name: stage for name, stage in found.items() if stage is not None}
    broken = found.keys() - stages.keys()
    attempts = {
        name: _validated_attempts(name, tables[name], stage, filled, faults)
        for name, stage in stages.items()
        if stage.attempted_changes
    }

    def check(stages: Mapping[str, Stage]) -> None:
        faults.extend(_reference_faults(stages, broken))
        faults.extend(_file_faults(stages, folders, absent))

    check(stages)
    if not faults:
        for name, stage in list(stages.items()):
            stages |= stage.completed(name, stages)
        faults.extend(f"stage.{name}.{fault}" for name, stage in stages.items() for fault in stage.faults_among(stages))
    families: dict[str, Branches] = {} if faults else {**_attempts(stages, attempts, faults)}
    if head is not None and head.sweep is not None:
        sweep = read_sweep(
            head.sweep, stages, tables, broken=broken, filled=filled, parallel=head.parallel, families=families, faults=faults
        )
        families |= {sweep.stage: sweep} if sweep else {}
    if families and not faults:
        check(expand(stages, families))
    if head is not None:
        faults.extend(_parallel_faults(stages, families, head.parallel))
    if faults or head is None:
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in faults))
    kept = tuple(override for override in overrides if not override.startswith("alerts.notify"))  # may hold a token
    return Recipe(path, head, stages, kept, _ordered(stages, families))


# Validating


def _filled(seed: int, alerts: dict[str, Any], kind: type[Stage], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stage over the seed of the recipe, if the kind has one, and over its alerts."""
    if "seed" in kind.model_fields:
        fields = {"seed": seed, **fields}
    if "alerts" in kind.model_fields and isinstance(fields.get("alerts", {}), dict):
        fields = {**fields, "alerts": merged(alerts, fields.get("alerts", {}))}
    return fields


def _validated_stage(name: str, tables: Mapping[str, Any], filled: Filled, faults: list[str]) -> Stage | None:
    fields, kinds = tables[name], stage_kinds()
    if not isinstance(fields, dict):
        faults.append(f"stage.{name}: expected a table, got {fields!r}")
        return None
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind is None:
        others = [other for other in tables if other != name]
        hint = nearest(name, others).replace("did you mean", "did you mean stage")
        faults.append(f"stage.{name}.kind: is missing; expected one of {listed(kinds)}{hint}")
        return None
    if not isinstance(kind, str) or kind not in kinds:
        faults.append(f"stage.{name}.kind: expected one of {listed(kinds)}, got {shown(kind)}{nearest(kind, kinds)}")
        return None
    return validated(kinds[kind], filled(kinds[kind], fields), f"stage.{name}.", faults)


def _parallel_faults(stages: Mapping[str, Stage], families: Mapping[str, Branches], parallel: Parallel) -> Iterator[str]:
    """The stages that cannot run as [parallel] says, and the attempts of the others that cannot."""
    found = {name: stage.parallel_fault(parallel) for name, stage in stages.items()}
    found |= {
        f"{name}.attempts[{number}]": changed[name].parallel_fault(parallel)
        for name, family in families.items()
        if isinstance(family, Attempts) and not found[name]
        for number, changed in enumerate(family.changed)
    }
    return (f"stage.{name}.{fault}" for name, fault in found.items() if fault)


# Attempts


def _validated_attempts(
    name: str, fields: Mapping[str, Any], stage: Stage, filled: Filled, faults: list[str]
) -> list[tuple[dict[str, Any], Stage]]:
    """Each valid attempt of a stage: its changes, and the stage with them."""
    attempts = []
    for number, written_change in enumerate(stage.attempted_changes):
        change = nested_change(type(stage), written_change)
        place = f"stage.{name}.attempts[{number}]"
        if fixed := [key for key in ("kind", "attempts") if key in change]:
            faults.append(f"{place}.{fixed[0]}: expected it outside of the attempts, since it is the same in all of them")
            continue
        written = {key: value for key, value in fields.items() if key not in ("kind", "attempts")}
        attempt = validated(type(stage), filled(type(stage), merged(written, change)), f"{place}.", faults)
        if attempt:
            attempts.append((change, attempt))
    return attempts


def _attempts(
    stages: Mapping[str, Stage], validated: Mapping[str, Sequence[tuple[dict[str, Any], Stage]]], faults: list[str]
) -> dict[str, Attempts]:
    """The branches of every stage with attempts; no stage may be in those of two."""
    attempts: dict[str, Attempts] = {}
    for name, of_stage in validated.items():
        members, judges = branched_stages(stages, name)
        family = Attempts(
            changes=tuple({name: change} for change, _ in of_stage),
            changed=tuple({name: stage} for _, stage in of_stage),
            names=branch_names(members, len(of_stage)),
            judges=judges,
        )
        for other in attempts.values():
            if common := sorted(family.members & other.members):
                faults.append(
                    f"stage.{name}.attempts: expected no stage that attempts of {other.stage!r} run too, got {listed(common)}"
                )
        if not judges:
            faults.append(f"stage.{name}.attempts: expected an evaluation with gates behind it, to judge them, got none")
        for taken in sorted(family.numbers.keys() & stages.keys()):
            faults.append(f"stage.{taken}: expected another name; an attempt of {name!r} has this one")
        attempts[name] = family
    return attempts


def _ordered(stages: Mapping[str, Stage], families: Mapping[str, Branches]) -> dict[str, Branches]:
    """The families, each before those that read from it."""
    if len(families) < 2:
        return dict(families)
    place = {name: number for number, name in enumerate(in_order(predecessors(expand(stages, families), families)))}
    return dict(sorted(families.items(), key=lambda item: max(place[judge] for judge in item[1].all_judges)))


# References and files


def _reference_faults(stages: Mapping[str, Stage], broken: AbstractSet[str]) -> Iterator[str]:
    dangling = False
    for name, stage in stages.items():
        for field, ref in edges(stage):
            place = f"stage.{name}.{field}"
            if ref in broken:
                continue
            if ref not in stages:
                dangling = True
                yield f"{place}: expected the name of a stage, got {str(ref)!r}{nearest(ref, [*stages, *broken])}"
            elif not stages[ref].makes.serves_as(ref.artifact):
                made = stages[ref].makes.__name__
                able = [other for other in stages if stages[other].makes.serves_as(ref.artifact) and other != name]
                hint = f"; these make it: {listed(able)}" if able else ""
                yield f"{place}: expected {ref.artifact.__name__}, but {str(ref)!r} makes {made}{hint}"
    if not dangling and (cycle := find_cycle(sources_of(stages))):
        yield f"stage.{cycle[0]}: expected stages without a cycle, got {' -> '.join(cycle)}"


def _file_faults(stages: Mapping[str, Stage], folders: AllowedFolders, absent: Container[str]) -> Iterator[str]:
    for name, stage in stages.items():
        for field, file in input_files(stage):
            place = f"stage.{name}.{field}"
            if file.hub:
                continue  # looked up when the stage runs
            fixed, behind = split_pattern(file.pattern)
            if ".." in behind:  # what it leads to cannot be known from the pattern
                yield f"{place}: expected no .. behind a wildcard, got {str(file)!r}"
            elif not folders.contain(fixed):
                yield f"{place}: {folders.fault(file, fixed)}"
            elif not (matches := file.matches()) and str(file.folder / file) in absent:
                continue
            elif not matches:
                yield f"{place}: expected a file, got nothing at {file.pattern}"
            elif outside := [match for match in matches if not folders.contain(match)]:
                yield f"{place}: {folders.fault(outside[0].name, outside[0])}"
            elif closed := [match for match in matches if not os.access(match, os.R_OK)]:
                yield f"{place}: expected a file that can be read, got {closed[0]} without the permission"


def _check_key(override: str, table: Mapping[str, Any]) -> None:
    """RecipeError where an override begins with the name of a stage."""
    name, stages = override.split("=")[0].split(".")[0].strip(), table.get("stage")
    if name not in Head.model_fields and isinstance(stages, dict) and name in stages:
        raise RecipeError(f"--set {override}: {name} is a stage, expected stage.{name}; did you mean --set stage.{override}?")


def _place_remote(table: dict[str, Any], folders: AllowedFolders) -> Iterator[str]:
    """Make a remote that is a folder absolute; a fault if it is not in an allowed folder, since results are written there."""
    cache = table.get("cache")
    remote = cache.get("remote") if isinstance(cache, dict) else None
    if not isinstance(remote, Located) or address_fault(remote) or not is_local(remote):
        return
    folder = remote.folder / local_folder(remote)
    table["cache"] = {**table["cache"], "remote": str(folder)}
    if not folders.contain(folder):
        yield f"cache.remote: {folders.fault(remote, folder)}, or name it with --remote"
