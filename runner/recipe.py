"""TOML to Recipe: reads the file and what it extends, validates all of it, and reports every fault at once.

A fault names the dotted path, what was found, what was wanted, and the nearest right name. Planning and running start
only from a Recipe, so nothing after this file checks fields again.
"""

import difflib
import importlib
import os
import pkgutil
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tomli
from pydantic import BaseModel, Field, ValidationError, field_validator

import runner.stages
from runner.errors import RecipeError
from runner.graph import edges, find_cycle, input_files, plain
from runner.paths import Bounds, fixed_part, leaves_by_name
from runner.remote import address_fault, is_local, local_folder
from runner.stage import Execution, Located, Parallel, Semantic, Spec, Stage

ALTERNATIVES = frozenset({"budget"})  # tables that name one of several things: a child's replaces its parent's whole
M = TypeVar("M", bound=BaseModel)


class CacheTable(Spec):
    """A cache elsewhere that is asked for what is not here; `--remote` and STOCKPOT_REMOTE override it."""

    remote: Execution[str | None] = None
    """s3://BUCKET/..., hf://OWNER/REPOSITORY/..., a folder, or memory://..."""
    upload: Execution[bool] = True
    """Whether what a run makes is uploaded there."""

    @field_validator("remote")
    @classmethod
    def _is_address(cls, remote: str | None) -> str | None:
        if remote is not None and (fault := address_fault(remote)):
            raise ValueError(fault)
        return remote


class Head(Spec):
    """What stands in a recipe above its stages."""

    name: Execution[Annotated[str, Field(pattern=r"^[\w.-]+$")]]
    """What the recipe is called."""
    description: Execution[str] = ""
    """One sentence on what comes out."""
    seed: Semantic[int] = 0
    """Default seed of every stage that draws randomness."""
    parallel: Execution[Parallel] = Parallel()
    """Where and how to run."""
    cache: Execution[CacheTable] = CacheTable()
    """Where else results may be."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be run: stages by name, in the order in which they are written."""

    path: Path
    head: Head
    stages: Mapping[str, Stage]

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with its defaults, ready for TOML; file names relative to the recipe's folder."""
        folder = self.path.parent.resolve()

        def relative(file: Located) -> str:
            return str(file) if Path(file).is_absolute() else os.path.relpath(file.folder / file, folder)

        stages = {name: {"kind": stage.kind, **plain(stage, file=relative)} for name, stage in self.stages.items()}
        return {**plain(self.head), "stage": stages}


@cache
def stage_kinds() -> Mapping[str, type[Stage]]:
    """Every kind of stage: importing a module of `runner.stages` registers its kinds."""
    for module in pkgutil.iter_modules(runner.stages.__path__):
        importlib.import_module(f"{runner.stages.__name__}.{module.name}")
    return Stage.registry


def load_recipe(path: Path, overrides: Sequence[str] = (), *, allowed: Sequence[Path] = ()) -> Recipe:
    """The recipe at `path` with `overrides` ("stage.base.seed=1") applied; RecipeError lists every fault.

    All that it names has to lie in its own folder or in one that is `allowed`.
    """
    bounds = Bounds(path.resolve().parent, tuple(allowed))
    table = _read_with_parents(path, (), bounds)
    for override in overrides:
        _apply_override(table, override, path)
    faults = list(_place_remote(table, bounds))
    stage_tables = table.pop("stage", None)
    head = _validate(Head, table, "", faults)
    stages: dict[str, Stage] = {}
    if not isinstance(stage_tables, dict) or not stage_tables:
        faults.append("stage: wants at least one [stage.NAME] table, found none")
        stage_tables = {}
    broken: set[str] = set()
    for name, fields in stage_tables.items():
        stage = _validate_stage(name, fields, head.seed if head else 0, faults)
        if stage is None:
            broken.add(name)
        else:
            stages[name] = stage
    faults.extend(_reference_faults(stages, broken))
    faults.extend(_file_faults(stages, bounds))
    if faults or head is None:
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in faults))
    return Recipe(path, head, stages)


# Reading


def _read_with_parents(path: Path, children: tuple[Path, ...], bounds: Bounds) -> dict[str, Any]:
    """The table of a file merged over the one it extends; every string remembers the folder it was written in."""
    path = path.resolve()
    if path in children:
        chain = " -> ".join(child.name for child in (*children, path))
        raise RecipeError(f"{children[-1]}: extends: wants a file that does not extend this one, found {chain}")
    try:
        with path.open("rb") as file:
            table = tomli.load(file)
    except FileNotFoundError as error:
        by = f", which {children[-1].name} extends" if children else ""
        raise RecipeError(f"{path}: no such recipe{by}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: wants UTF-8 text, found byte {error.object[error.start]:#04x}") from error
    except (tomli.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not TOML: {error}") from error
    located: dict[str, Any] = _locate(table, path.parent)
    parent = located.pop("extends", None)
    if parent is None:
        return located
    if not isinstance(parent, Located) or not parent or "\0" in parent:
        raise RecipeError(f"{path}: extends: wants the path of a recipe, found {_shown(parent)}")
    if not bounds.hold(parent.folder / parent):
        raise RecipeError(f"{path}: extends: {bounds.fault(parent, parent.folder / parent)}")
    return _merge(_read_with_parents(parent.folder / parent, (*children, path), bounds), located)


def _locate(value: Any, folder: Path) -> Any:
    match value:
        case str():
            return Located(value, folder)
        case dict():
            return {key: _locate(item, folder) for key, item in value.items()}
        case list():
            return [_locate(item, folder) for item in value]
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merge deeply, `above` wins; lists, plain values and tables of alternatives replace."""
    both = {**below, **above}
    for key in (below.keys() & above.keys()) - ALTERNATIVES:
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _merge(below[key], above[key])
    return both


def _apply_override(table: dict[str, Any], override: str, path: Path) -> None:
    """`key.path=value` from the command line: the value is read as TOML, else as a string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override}: wants KEY=VALUE with a dotted key, such as stage.base.seed=1")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (tomli.TOMLDecodeError, RecursionError):
        value = text.strip()
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[: depth + 1])} is a value, not a table")
    table[parts[-1]] = _locate(value, path.resolve().parent)


# Validating


def _validate_stage(name: str, fields: Any, seed: int, faults: list[str]) -> Stage | None:
    if not isinstance(fields, dict):
        faults.append(f"stage.{name}: wants a table, found {fields!r}")
        return None
    fields = dict(fields)
    kinds = stage_kinds()
    kind = fields.pop("kind", None)
    if kind is None:
        faults.append(f"stage.{name}.kind: is missing; wants one of {_listed(kinds)}")
        return None
    if not isinstance(kind, str) or kind not in kinds:
        faults.append(f"stage.{name}.kind: found {_shown(kind)}, wants one of {_listed(kinds)}{_nearest(kind, kinds)}")
        return None
    if "seed" in kinds[kind].model_fields:
        fields.setdefault("seed", seed)
    return _validate(kinds[kind], fields, f"stage.{name}.", faults)


def _validate(model: type[M], table: dict[str, Any], prefix: str, faults: list[str]) -> M | None:
    """An instance of `model`, or None after adding each fault once, with its dotted path."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        wants: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False):
            where = _path_in(table, fault["loc"])
            message = _message(model, fault, where)
            wants.setdefault(prefix + _dotted(where) if where else prefix.rstrip("."), []).append(message)
        for where_text, messages in wants.items():
            faults.append(f"{where_text}: {_joined(messages)}")
        return None


def _message(model: type[BaseModel], fault: Any, where: Sequence[str | int]) -> str:
    found = fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            names = _field_names(model, where[:-1])
            return f"is not known here; wants one of {_listed(names)}{_nearest(where[-1], names)}"
        case "missing":
            return "is missing"
        case "literal_error":
            expected = fault["ctx"]["expected"]
            return f"found {_shown(found)}, wants {expected}{_nearest(found, _quoted(expected))}"
        case "value_error":
            return str(fault["ctx"]["error"])
    text = fault["msg"].removeprefix("Input should be ")
    return f"found {_shown(found)}, wants {text}"


def _joined(messages: Sequence[str]) -> str:
    """One message out of the several that a union gives for one place."""
    unique = list(dict.fromkeys(messages))
    found, marker, _ = unique[0].partition(", wants ")
    if len(unique) > 1 and marker and all(message.startswith(found + marker) for message in unique):
        return found + marker + ", or ".join(message.removeprefix(found + marker) for message in unique)
    return "; ".join(unique)


def _path_in(table: Any, location: Sequence[str | int]) -> list[str | int]:
    """The part of pydantic's location that is a path in the recipe: the names of union members in it are not."""
    path: list[str | int] = []
    here = table
    for index, part in enumerate(location):
        if isinstance(here, dict) and part in (here.get("task"), here.get("name")) and index < len(location) - 1:
            continue  # the tag by which pydantic chose among several tables
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        ):
            path.append(part)
            here = here[part]  # type: ignore[index]  # the two cases above
        elif isinstance(here, dict) and isinstance(part, str) and index == len(location) - 1:
            path.append(part)  # a key that is missing
    return path


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _field_names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that may stand in the table at `path` below `model`."""
    models = [model]
    for part in path:
        if isinstance(part, str):
            fields = (m.model_fields[part].annotation for m in models if part in m.model_fields)
            models = [found for annotation in fields for found in _models_in(annotation)]
    names = [name for m in models for name in m.model_fields]
    if not path:
        names += ["kind"] if issubclass(model, Stage) else ["stage", "extends"]
    return list(dict.fromkeys(names))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in (list, dict, tuple, Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _quoted(expected: str) -> list[str]:
    return [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]


def _shown(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:80], list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
                yield f"{place}: found {str(ref)!r}, wants the name of a stage{_nearest(ref, [*stages, *broken])}"
            elif not issubclass(stages[ref].makes, ref.wants):
                made = stages[ref].makes.__name__
                able = [other for other in stages if issubclass(stages[other].makes, ref.wants) and other != name]
                hint = f"; these make it: {_listed(able)}" if able else ""
                yield f"{place}: wants {ref.wants.__name__}, but {str(ref)!r} makes {made}{hint}"
    if not dangling and (cycle := find_cycle(stages)):
        yield f"stage.{cycle[0]}: wants stages without a cycle, found {' -> '.join(cycle)}"


def _file_faults(stages: Mapping[str, Stage], bounds: Bounds) -> Iterator[str]:
    for name, stage in stages.items():
        for field, file in input_files(stage):
            place = f"stage.{name}.{field}"
            if leaves_by_name(file.pattern):
                yield f"{place}: found {str(file)!r}, wants no .. behind a wildcard"
            elif not bounds.hold(fixed_part(file.pattern)):
                yield f"{place}: {bounds.fault(file, fixed_part(file.pattern))}"
            elif not (matches := file.matches()):
                yield f"{place}: wants a file, found nothing at {file.pattern}"
            elif outside := [match for match in matches if not bounds.hold(match)]:
                yield f"{place}: {bounds.fault(outside[0].name, outside[0])}"
            elif closed := [match for match in matches if not os.access(match, os.R_OK)]:
                yield f"{place}: wants a file, found {closed[0]}, which may not be read"


def _place_remote(table: dict[str, Any], bounds: Bounds) -> Iterator[str]:
    """Makes a remote that is a folder absolute, and says where it is not inside the bounds: results are written there."""
    cache = table.get("cache")
    remote = cache.get("remote") if isinstance(cache, dict) else None
    if not isinstance(remote, Located) or address_fault(remote) or not is_local(remote):
        return
    folder = remote.folder / local_folder(remote)
    table["cache"] = {**table["cache"], "remote": str(folder)}
    if not bounds.hold(folder):
        yield f"cache.remote: {bounds.fault(remote, folder)}, or name it with --remote"
