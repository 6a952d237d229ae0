"""The graph of stages: its edges, its order, and the identity of a stage, from which its cache key is made.

Pure functions over stages; nothing here touches the cache. The caller gives the digests of input files.
"""

import graphlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from runner.input_files import InputFile
from runner.stage import Identity, Ref, Spec, Stage

KEY_FORMAT = 1  # raised when the structure of an identity changes, which changes every key


def edges(stage: Stage, *, read_only: bool = False) -> Iterator[tuple[str, Ref[Any]]]:
    """Each reference of a stage to another, with its dotted field; `read_only`: only those to artifacts that it reads."""
    return ((field, value) for field, value in _values(stage, semantic_only=read_only) if isinstance(value, Ref))


def input_files(stage: Stage) -> Iterator[tuple[str, InputFile]]:
    """Each path or glob of input files of a stage, with its dotted field."""
    return ((field, value) for field, value in _values(stage) if isinstance(value, InputFile))


def tables(stage: Stage) -> Iterator[tuple[str, BaseModel]]:
    """Each table inside a stage, with its dotted field."""
    return ((field, value) for field, value in _values(stage) if isinstance(value, BaseModel))


def _values(value: Any, field: str = "", *, semantic_only: bool = False) -> Iterator[tuple[str, Any]]:
    """Everything inside `value`, tables before what they hold, with its dotted field."""
    match value:
        case BaseModel():
            inside = [
                (f"{field}.{name}".removeprefix("."), getattr(value, name)) for name in _kept_fields(value, semantic_only)
            ]
        case dict():
            inside = [(f"{field}.{key}", item) for key, item in value.items()]
        case list() | tuple():
            inside = [(f"{field}[{index}]", item) for index, item in enumerate(value)]
        case _:
            return
    for name, item in inside:
        yield name, item
        yield from _values(item, name, semantic_only=semantic_only)


def plain(
    value: Any,
    *,
    ref: Callable[[Ref[Any]], Any] = str,
    file: Callable[[InputFile], Any] = str,
    semantic_only: bool = False,
) -> Any:
    """A stage as plain data, with references and files converted by `ref` and `file`; None values are left out."""

    def convert(item: Any) -> Any:
        match item:
            case Ref():
                return ref(item)
            case InputFile():
                return file(item)
            case BaseModel():
                return {name: convert(getattr(item, name)) for name in _kept_fields(item, semantic_only)}
            case dict():
                return {str(key): convert(part) for key, part in item.items()}
            case list() | tuple():
                return [convert(part) for part in item]
        return str(item) if isinstance(item, str) else item

    return convert(value)


def _kept_fields(model: BaseModel, semantic_only: bool) -> Iterator[str]:
    for name, info in type(model).model_fields.items():
        if getattr(model, name) is None:
            continue
        if semantic_only and isinstance(model, Spec) and Identity.SEMANTIC not in info.metadata:
            continue
        yield name


def renamed(stage: Stage, names: Mapping[str, str]) -> Stage:
    """The stage with its references renamed by `names`; names that are not in it stay."""

    def convert(item: Any) -> Any:
        match item:
            case Ref():
                return Ref.to(item.artifact, names.get(item, item))
            case BaseModel():
                return item.model_copy(update={name: convert(getattr(item, name)) for name in type(item).model_fields})
            case dict():
                return {key: convert(part) for key, part in item.items()}
            case list() | tuple():
                return [convert(part) for part in item]
        return item

    copy: Stage = convert(stage)
    return copy


def inputs_of(stages: Mapping[str, Stage]) -> dict[str, list[str]]:
    """For each stage, the stages whose artifacts it reads, each once. Its key depends on these."""
    return {name: _refs(stage, read_only=True) for name, stage in stages.items()}


def sources_of(stages: Mapping[str, Stage]) -> dict[str, list[str]]:
    """For each stage, the stages that run before it: its inputs, and those named by fields that are not part of its key."""
    return {name: _refs(stage, read_only=False) for name, stage in stages.items()}


def _refs(stage: Stage, *, read_only: bool) -> list[str]:
    return list(dict.fromkeys(str(ref) for _, ref in edges(stage, read_only=read_only)))


def in_order(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """Names in topological order, ties as written. The graph must not have a cycle."""
    waiting, order = dict.fromkeys(sources), list[str]()
    while waiting:
        order.append(next(name for name in waiting if waiting.keys().isdisjoint(sources[name])))
        del waiting[order[-1]]
    return order


def ancestors(sources: Mapping[str, Sequence[str]], *names: str) -> set[str]:
    """All stages before any of `names`, directly or not; a name itself is included only if it is before another one."""
    found, waiting = set[str](), list(names)
    while waiting:
        for source in sources[waiting.pop()]:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def find_cycle(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """The names along a cycle, the first repeated at the end; empty if there is none. Names that are not keys are ignored."""
    try:
        graphlib.TopologicalSorter(sources).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def identity(
    stage: Stage,
    *,
    artifacts: Mapping[str, str],
    files: Callable[[InputFile], list[list[str]]],
    recipe: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """What decides the result of a stage: kind, version, semantic fields, the content of its inputs, and the recipe if the
    artifact holds it.

    `artifacts` has the digest of each stage's artifact by name; `files` gives [format, digest] of each file; `recipe` the
    recipe as it is published.
    """
    fields = plain(
        stage,
        ref=lambda ref: {"artifact": artifacts[ref]},
        file=lambda file: {"content": files(file)},
        semantic_only=True,
    )
    fields |= stage.extra_identity()
    if stage.holds_recipe:
        fields["recipe"] = {"content": key_of(recipe())}
    return {"format": KEY_FORMAT, "kind": stage.kind, "version": stage.version, "fields": fields}


def key_of(identity: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of an identity, in hex."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The changes between two identities, a line each: `schedule.learning_rate: 0.001 -> 0.003`."""
    return changes(*({**one["fields"], "version": one["version"]} for one in (old, new)))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The changes between two tables of plain data, a line for each dotted name."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = list(dict.fromkeys([*before, *after]))
    return [_difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def _difference(name: str, before: Any, after: Any) -> str:
    if name.endswith((".artifact", ".content")):
        return f"{name.rpartition('.')[0]}: its content changed"
    return f"{name}: {_value(before)} -> {_value(after)}"


def _value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    match value:
        case dict() if value:
            for key, item in value.items():
                yield from _flat(item, f"{name}.{key}".removeprefix("."))
        case list() if any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from _flat(item, f"{name}[{index}]")
        case _:
            yield name, value
