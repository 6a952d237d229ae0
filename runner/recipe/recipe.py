"""TOML to Recipe: reads the file and what it extends, validates all of it, and reports every fault at once.

Planning and running start only from a Recipe, so nothing after this file checks fields again. How files are read and merged is
`runner.recipe.toml`' business, how a fault is told `runner.recipe.validation`'.
"""

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.cache.remote import address_fault, is_local, local_folder
from runner.errors import RecipeError
from runner.graph import ancestors, edges, find_cycle, in_order, input_files, plain, sources_of
from runner.input_files import AllowedFolders, InputFile, Located, fixed_part, has_parent_behind_wildcard
from runner.recipe.branches import Attempts, Branches, Sweep, branches, changes_of, expand, numbered, sources
from runner.recipe.head import Head
from runner.recipe.sweep import read_sweep
from runner.recipe.sweep import resolved as resolved_sweep
from runner.recipe.toml import apply_override, merged, read_with_parents
from runner.recipe.validation import listed, nearest, shown, validated
from runner.stage import Stage
from runner.stages import stage_kinds


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be run: stages by name, in the order in which they are written."""

    path: Path
    head: Head
    written: Mapping[str, Stage]
    families: Mapping[str, Branches]  # attempts and settings, by the stage that names them; each before those behind it

    @cached_property
    def stages(self) -> Mapping[str, Stage]:
        """Ordinary stages, those of every branch among them; what reads from branches reads the first."""
        return expand(self.written, self.families)

    def with_branches(self, chosen: Mapping[str, int]) -> Mapping[str, Stage]:
        """The same where what reads from branches reads those that are `chosen`, by the stage that names the family."""
        return expand(self.written, self.families, chosen)

    @property
    def sweep(self) -> Sweep | None:
        """Its sweep, if it has one."""
        return next((family for family in self.families.values() if isinstance(family, Sweep)), None)

    def family_of(self, name: str) -> Branches | None:
        """The branches that a stage, by its name as written, belongs to."""
        return next((family for family in self.families.values() if name in family.members), None)

    def names_of(self, name: str) -> list[str]:
        """The stages that `name` stands for: itself, or those of its branches."""
        family = self.family_of(name)
        return [name] if family is None else list(dict.fromkeys(branch[name] for branch in family.names))

    def needed(self, name: str) -> set[str]:
        """The stages that a run until `name` may run. All branches with their judges, where it stands for branches."""
        family = self.family_of(name)
        names = [*self.names_of(name), *(family.all_judges if family else ())]
        return {*names, *ancestors(sources(self.stages, self.families), *names)}

    def resolved(self, chosen: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The whole recipe with its defaults, ready for TOML; file names relative to the recipe's folder. With the branches
        that are `chosen` it has these alone, as if they had been written.
        """
        folder = self.path.parent.resolve()

        def relative(file: InputFile) -> str:
            if file.hub:
                return str(file)
            return str(file) if Path(file).is_absolute() else os.path.relpath(file.folder / file, folder)

        def table(name: str, stage: Stage) -> dict[str, Any]:
            family = self.family_of(name)
            if chosen is not None and family is not None:
                stage = family.changed[chosen[family.stage]].get(name, stage)
            fields = {"kind": stage.kind, **plain(stage, file=relative)}
            if chosen is None and isinstance(family, Attempts) and name == family.stage:
                tries = [plain(changed[name], file=relative) for changed in family.changed]
                pairs = zip(family.changes, tries, strict=True)
                fields["attempts"] = [{key: attempt[key] for key in change[name]} for change, attempt in pairs]
            return fields

        stages = {name: table(name, stage) for name, stage in self.written.items()}
        head = plain(self.head)
        del head["alerts"]["notify"]
        if (sweep := self.sweep) is not None:
            if chosen is None:
                tables = [{n: plain(s, file=relative) for n, s in changed.items()} for changed in sweep.changed]
                head["sweep"] = resolved_sweep(sweep, tables=tables)
            else:
                del head["sweep"]
        return {**head, "stage": stages}


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, allowed: Sequence[Path] = (), absent: Container[str] = ()
) -> Recipe:
    """The recipe at `path` with `overrides` ("stage.base.seed=1") applied; RecipeError lists every fault.

    All that it names has to lie in its own folder or in one that is `allowed`. Input files at the places `absent` may be
    missing: what they hold is known, and a result that was made of them may be in the cache.
    """
    folders = AllowedFolders(path.resolve().parent, tuple(allowed))
    table = read_with_parents(path, (), folders)
    for override in overrides:
        apply_override(table, override, path)
    faults = list(_place_remote(table, folders))
    stage_tables = table.pop("stage", None)
    head = validated(Head, table, "", faults)
    alerts = {key: value for key, value in table.get("alerts", {}).items() if key != "notify"} if head else {}
    stages: dict[str, Stage] = {}
    if not isinstance(stage_tables, dict) or not stage_tables:
        faults.append("stage: expected at least one [stage.NAME] table, got none")
        stage_tables = {}
    broken: set[str] = set()
    for name, fields in stage_tables.items():
        others = [other for other in stage_tables if other != name]
        stage = _validate_stage(name, fields, head.seed if head else 0, alerts, faults, others=others)
        if stage is None:
            broken.add(name)
        else:
            stages[name] = stage
    seed = head.seed if head else 0
    tried = {
        name: _tried(name, stage_tables[name], stage, seed, alerts, faults)
        for name, stage in stages.items()
        if stage.attempted_changes
    }
    faults.extend(_reference_faults(stages, broken))
    faults.extend(_file_faults(stages, folders, absent))
    if not faults:
        for name, stage in list(stages.items()):
            stages |= stage.completed(name, stages)
        faults.extend(f"stage.{name}.{fault}" for name, stage in stages.items() for fault in stage.faults_among(stages))
    families: dict[str, Branches] = {}
    attempts = _attempts(stages, tried, faults) if not faults else {}
    families |= attempts
    if head is not None and head.sweep is not None:
        sweep = read_sweep(
            head.sweep,
            stages,
            stage_tables,
            broken=broken,
            filled=lambda kind, fields: _filled(kind, fields, seed, alerts),
            parallel=head.parallel,
            families=families,
            faults=faults,
        )
        families |= {sweep.stage: sweep} if sweep else {}
    if families and not faults:
        expanded = expand(stages, families)
        faults.extend(_reference_faults(expanded, broken))
        faults.extend(_file_faults(expanded, folders, absent))
    if head is not None:
        found = {name: stage.parallel_fault(head.parallel) for name, stage in stages.items()}
        found |= {  # of attempts, what they alone are at odds with
            f"{name}.attempts[{number}]": changed[name].parallel_fault(head.parallel)
            for name, family in attempts.items()
            for number, changed in enumerate(family.changed)
            if not found[name]
        }
        faults.extend(f"stage.{name}.{fault}" for name, fault in found.items() if fault)
    if faults or head is None:
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in faults))
    return Recipe(path, head, stages, _ordered(stages, families))


# Validating


def _validate_stage(
    name: str, fields: Any, seed: int, alerts: dict[str, Any], faults: list[str], *, others: Sequence[str]
) -> Stage | None:
    if not isinstance(fields, dict):
        faults.append(f"stage.{name}: expected a table, got {fields!r}")
        return None
    fields = dict(fields)
    kinds = stage_kinds()
    kind = fields.pop("kind", None)
    if kind is None:
        meant = nearest(name, others).replace("did you mean", "did you mean stage")
        faults.append(f"stage.{name}.kind: is missing; expected one of {listed(kinds)}{meant}")
        return None
    if not isinstance(kind, str) or kind not in kinds:
        faults.append(f"stage.{name}.kind: expected one of {listed(kinds)}, got {shown(kind)}{nearest(kind, kinds)}")
        return None
    return validated(kinds[kind], _filled(kinds[kind], fields, seed, alerts), f"stage.{name}.", faults)


def _filled(kind: type[Stage], fields: dict[str, Any], seed: int, alerts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stage over what the head says for all: its seed, where the kind draws numbers, and its alerts."""
    if "seed" in kind.model_fields:
        fields = {"seed": seed, **fields}
    if "alerts" in kind.model_fields and isinstance(fields.get("alerts", {}), dict):
        fields = {**fields, "alerts": merged(alerts, fields.get("alerts", {}))}
    return fields


# Attempts


def _tried(
    name: str, fields: Mapping[str, Any], stage: Stage, seed: int, alerts: dict[str, Any], faults: list[str]
) -> list[tuple[dict[str, Any], Stage]]:
    """Each attempt of a stage: what it changes, and the stage with it."""
    tried = []
    for number, change in enumerate(changes_of(type(stage), stage.attempted_changes)):
        place = f"stage.{name}.attempts[{number}]"
        if fixed := [key for key in ("kind", "attempts") if key in change]:
            faults.append(f"{place}.{fixed[0]}: is the same in all attempts; expected it outside of them")
            continue
        written = {key: value for key, value in fields.items() if key not in ("kind", "attempts")}
        filled = _filled(type(stage), merged(written, change), seed, alerts)
        if attempt := validated(type(stage), filled, f"{place}.", faults):
            tried.append((change, attempt))
    return tried


def _attempts(
    stages: Mapping[str, Stage], tried: Mapping[str, Sequence[tuple[dict[str, Any], Stage]]], faults: list[str]
) -> dict[str, Attempts]:
    """The attempts of every stage that has some, with their branches, which have to be apart."""
    attempts: dict[str, Attempts] = {}
    for name, tries in tried.items():
        members, judges = branches(stages, name)
        family = Attempts(
            changes=tuple({name: change} for change, _ in tries),
            changed=tuple({name: stage} for _, stage in tries),
            names=numbered(members, len(tries)),
            judges=judges,
        )
        for other in attempts.values():
            if common := sorted(family.members & other.members):
                faults.append(
                    f"stage.{name}.attempts: expected no stage that attempts of {other.stage!r} run too, got {listed(common)}"
                )
        if not judges:
            faults.append(f"stage.{name}.attempts: expected an evaluation with gates behind it, to judge them, got none")
        for taken in sorted(family.places.keys() & stages.keys()):
            faults.append(f"stage.{taken}: expected another name; an attempt of {name!r} has this one")
        attempts[name] = family
    return attempts


def _ordered(stages: Mapping[str, Stage], families: Mapping[str, Branches]) -> dict[str, Branches]:
    """Families so that each stands before those that read from it: what decides on the latter comes after it."""
    if len(families) < 2:
        return dict(families)
    place = {name: number for number, name in enumerate(in_order(sources(expand(stages, families), families)))}
    return dict(sorted(families.items(), key=lambda item: max(place[judge] for judge in item[1].all_judges)))


# References and files


def _reference_faults(stages: Mapping[str, Stage], broken: set[str]) -> Iterator[str]:
    dangling = False
    for name, stage in stages.items():
        for field, ref in edges(stage):
            place = f"stage.{name}.{field}"
            if ref in broken:
                continue
            if ref not in stages:
                dangling = True
                yield f"{place}: expected the name of a stage, got {str(ref)!r}{nearest(ref, [*stages, *broken])}"
            elif not issubclass(stages[ref].makes, ref.artifact):
                made = stages[ref].makes.__name__
                able = [other for other in stages if issubclass(stages[other].makes, ref.artifact) and other != name]
                hint = f"; these make it: {listed(able)}" if able else ""
                yield f"{place}: expected {ref.artifact.__name__}, but {str(ref)!r} makes {made}{hint}"
    if not dangling and (cycle := find_cycle(sources_of(stages))):
        yield f"stage.{cycle[0]}: expected stages without a cycle, got {' -> '.join(cycle)}"


def _file_faults(stages: Mapping[str, Stage], folders: AllowedFolders, absent: Container[str]) -> Iterator[str]:
    for name, stage in stages.items():
        for field, file in input_files(stage):
            place = f"stage.{name}.{field}"
            if file.hub:
                continue  # whether it is there is for the Hub to say, once the stage runs
            if has_parent_behind_wildcard(file.pattern):
                yield f"{place}: expected no .. behind a wildcard, got {str(file)!r}"
            elif not folders.contain(fixed_part(file.pattern)):
                yield f"{place}: {folders.fault(file, fixed_part(file.pattern))}"
            elif not (matches := file.matches()) and str(file.folder / file) in absent:
                continue
            elif not matches:
                yield f"{place}: expected a file, got nothing at {file.pattern}"
            elif outside := [match for match in matches if not folders.contain(match)]:
                yield f"{place}: {folders.fault(outside[0].name, outside[0])}"
            elif closed := [match for match in matches if not os.access(match, os.R_OK)]:
                yield f"{place}: expected a file, got {closed[0]}, which may not be read"


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
