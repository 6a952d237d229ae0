"""The graph of stages: its edges, its order, and what makes two stages the same (identity).

Pure functions over stages; nothing here touches the cache. Input files are known by the digests that the caller gives.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from runner.stage import Identity, InputFile, Ref, Spec, Stage

KEY_FORMAT = 1  # raised when the form of an identity changes: every key changes with it


def edges(stage: Stage) -> Iterator[tuple[str, Ref[Any]]]:
    """Each reference of a stage to another, with the dotted field that holds it."""
    return ((field, leaf) for field, leaf in _leaves(stage) if isinstance(leaf, Ref))


def input_files(stage: Stage) -> Iterator[tuple[str, InputFile]]:
    """Each path or glob of input files of a stage, with the dotted field that holds it."""
    return ((field, leaf) for field, leaf in _leaves(stage) if isinstance(leaf, InputFile))


def _leaves(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    match value:
        case BaseModel():
            for name in type(value).model_fields:
                yield from _leaves(getattr(value, name), f"{field}.{name}".removeprefix("."))
        case dict():
            for key, item in value.items():
                yield from _leaves(item, f"{field}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                yield from _leaves(item, f"{field}[{index}]")
        case _:
            yield field, value


def plain(
    value: Any,
    *,
    ref: Callable[[Ref[Any]], Any] = str,
    file: Callable[[InputFile], Any] = str,
    semantic_only: bool = False,
) -> Any:
    """A stage as plain data, with references and files as `ref` and `file` show them; None values are left out."""

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


def inputs_of(stages: Mapping[str, Stage]) -> dict[str, list[str]]:
    """For each stage the stages it reads, without repetition."""
    return {name: list(dict.fromkeys(str(ref) for _, ref in edges(stage))) for name, stage in stages.items()}


def in_order(stages: Mapping[str, Stage]) -> list[str]:
    """Names in topological order, ties as written. The stages have no cycle."""
    inputs = inputs_of(stages)
    waiting = {name: len(inputs[name]) for name in stages}
    readers: dict[str, list[str]] = {name: [] for name in stages}
    for name, sources in inputs.items():
        for source in sources:
            readers[source].append(name)
    order: list[str] = []
    ready = [(place, name) for place, name in enumerate(stages) if not waiting[name]]  # a heap: as written first
    places = {name: place for place, name in enumerate(stages)}
    while ready:
        _, name = heapq.heappop(ready)
        order.append(name)
        for reader in readers[name]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (places[reader], reader))
    return order


def ancestors(stages: Mapping[str, Stage], name: str) -> set[str]:
    """All stages that `name` needs, directly or not; itself not among them."""
    inputs, found, open_names = inputs_of(stages), set[str](), [name]
    while open_names:
        for source in inputs[open_names.pop()]:
            if source not in found:
                found.add(source)
                open_names.append(source)
    return found


def find_cycle(stages: Mapping[str, Stage]) -> list[str]:
    """Names along a cycle, the first repeated at the end; empty if there is none. Every reference must exist or is ignored."""
    inputs = inputs_of(stages)
    done: set[str] = set()
    for start in stages:
        path: list[str] = []
        trail = [iter([start])]
        while trail:
            name = next(trail[-1], None)
            if name is None:
                trail.pop()
                if path:
                    done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name in stages and name not in done:
                path.append(name)
                trail.append(iter(inputs[name]))
    return []


def identity(stage: Stage, *, artifacts: Mapping[str, str], files: Callable[[InputFile], list[list[str]]]) -> dict[str, Any]:
    """What decides the result of a stage: kind, version, semantic fields, and the content of its inputs.

    `artifacts` maps the names of stages to the digests of their artifacts; `files` gives [format, digest] of each file.
    """
    fields = plain(
        stage,
        ref=lambda ref: {"artifact": artifacts[ref]},
        file=lambda file: {"content": files(file)},
        semantic_only=True,
    )
    fields |= stage.decided()
    return {"format": KEY_FORMAT, "kind": stage.kind, "version": stage.version, "fields": fields}


def key_of(identity: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of an identity, in hex."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, a line each: `schedule.learning_rate: 0.001 -> 0.003`."""
    return changes(*({**one["fields"], "version": one["version"]} for one in (old, new)))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two tables of plain data, a line for each dotted name."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = list(dict.fromkeys([*before, *after]))
    return [_difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def _difference(name: str, before: Any, after: Any) -> str:
    for what in ("artifact", "content"):
        if name.endswith(f".{what}"):
            return f"{name.removesuffix(f'.{what}')}: its content changed"
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
