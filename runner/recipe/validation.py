"""Validation of a recipe's tables, and the messages for their faults: `dotted.path: expected X, got Y; did you mean 'x'?`."""

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from runner.stage import Stage

M = TypeVar("M", bound=BaseModel)

WORDS = [  # pydantic's terms, and those of recipes
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"a valid (dictionary|dict\w*)( or (instance of \w+|object to extract fields from))?", "a table"),
        (r"(List|String) should have (at \w+ \d+ \w+)( after validation, not \d+)?", r"\2"),
        (r"String should match pattern", "a text like"),
    )
]


def validated(model: type[M], table: dict[str, Any], prefix: str, faults: list[str]) -> M | None:
    """An instance of `model`, or None after adding each fault once, with its dotted path."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        by_place: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False):
            where = _path_in(table, fault["loc"], is_of_key=fault["type"] in ("missing", "extra_forbidden"))
            message = _message(model, fault, where)
            by_place.setdefault(prefix + _dotted(where) if where else prefix.rstrip("."), []).append(message)
        for where_text, messages in by_place.items():
            faults.append(f"{where_text}: {_joined(messages)}")
        return None


def _message(model: type[BaseModel], fault: Any, where: Sequence[str | int]) -> str:
    found = fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            names = _field_names(model, where[:-1])
            return f"is not known here; expected one of {listed(names)}{nearest(where[-1], names)}"
        case "missing":
            return "is missing"
        case "literal_error":
            expected = fault["ctx"]["expected"]
            return f"expected {expected}, got {shown(found)}{nearest(found, _quoted(expected))}"
        case "value_error":
            return str(fault["ctx"]["error"])
    text = fault["msg"].removeprefix("Input should be ")
    for theirs, ours in WORDS:
        text = theirs.sub(ours, text)
    return f"expected {text}, got {shown(found)}"


def _joined(messages: Sequence[str]) -> str:
    """One message for the several that the members of a union give for one place."""
    unique = list(dict.fromkeys(messages))
    expected, found = zip(
        *(message.split(", got ", 1) if ", got " in message else ("", message) for message in unique), strict=True
    )
    values = {text.partition("; did you mean ")[0] for text in found}
    if len(unique) > 1 and len(values) == 1 and all(text.startswith("expected ") for text in expected):
        wanted = ", or ".join(text.removeprefix("expected ") for text in expected)
        return f"expected {wanted}, got {max(found, key=len)}"
    return "; ".join(unique)


def _path_in(table: Any, location: Sequence[str | int], *, is_of_key: bool) -> list[str | int]:
    """The part of pydantic's location that is a path in the recipe, without the names of union members. A fault that
    `is_of_key` ends in a key that may be missing.
    """
    path: list[str | int] = []
    here = table
    for index, part in enumerate(location):
        if isinstance(here, dict) and part in (here.get("task"), here.get("name")) and index < len(location) - 1:
            continue  # the tag by which pydantic chooses among several tables
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        ):
            path.append(part)
            here = here[part]  # type: ignore[index]  # the two cases above
        elif is_of_key and isinstance(here, dict) and isinstance(part, str) and index == len(location) - 1:
            path.append(part)  # a key that is missing
    return path


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _field_names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that the table at `path` below `model` may have."""
    models = [model]
    for part in path:
        if isinstance(part, str):
            fields = (m.model_fields[part].annotation for m in models if part in m.model_fields)
            models = [found for annotation in fields for found in models_in(annotation)]
    names = [name for m in models for name in m.model_fields]
    if not path:
        names += ["kind"] if issubclass(model, Stage) else ["stage", "extends"]
    return list(dict.fromkeys(names))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables that a field with this annotation may hold."""
    if get_origin(annotation) in (list, dict, tuple, Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _quoted(expected: str) -> list[str]:
    return [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]


def shown(value: Any) -> str:
    """A value for a message: strings in quotes, and at most 80 characters."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str]) -> str:
    """Names to choose from, sorted."""
    return ", ".join(sorted(names))


def nearest(name: Any, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar name; empty if none is similar."""
    close = difflib.get_close_matches(str(name)[:80], list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
