"""The reference of recipes in Markdown: every table and field, from the classes that validate them and their docstrings."""

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from runner.input_files import InputFile
from runner.recipe.head import Head
from runner.recipe.schema import docstrings, with_nested
from runner.stage import Identity, Ref
from runner.stages import stage_kinds

INTRODUCTION = """# Reference of recipes

Every table and field that a recipe may have. This page is generated from the classes that validate recipes, by

```sh
run schema --markdown > recipes/reference.md
```

**Key** says whether a field decides the result and is part of the stage's key: changing a field with *yes* makes the stage run
again, changing one with *no* does not. *As its table*: like the field that holds the table. A field with the default *needed*
is required. "Stage: X" is the name of a stage that makes an X.
"""

LIMITS = {  # by the attributes of an annotation that hold them
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
    "pattern": "like `{}`",
}
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): ""}


def recipe_reference() -> str:
    """The whole page."""
    kinds = sorted(stage_kinds().items())
    tables: list[type[BaseModel]] = [Head, *(model for _, model in kinds)]
    nested = sorted({*with_nested(tables)} - {*tables}, key=lambda model: model.__name__)
    contents = ", ".join(f"[{kind}](#{kind})" for kind, _ in kinds)
    lines = [INTRODUCTION, f"Kinds of stages: {contents}.\n", "## The head of a recipe\n", *_fields(Head)]
    lines += [
        "`extends` (text) is the path of another recipe, over which this one is merged. Each `[stage.NAME]` has the field "
        "`kind` and the fields of that kind.\n"
    ]
    for kind, model in kinds:
        lines += [f"## {kind}\n", f"{_on_one_line(inspect.getdoc(model))} Makes: {model.makes.__name__}.\n", *_fields(model)]
    lines += ["## Nested tables\n"]
    for table in nested:
        lines += [f"### {table.__name__}\n", f"{_on_one_line(inspect.getdoc(table))}\n", *_fields(table)]
    return "\n".join(lines).rstrip() + "\n"


def _fields(model: type[BaseModel]) -> Iterator[str]:
    texts = docstrings(model)
    yield "| field | type | default | key | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", _type_of(field), _default(field), _key(field), _on_one_line(texts.get(name, "")))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _key(field: FieldInfo) -> str:
    marks = [mark for mark in field.metadata if isinstance(mark, Identity)]
    if not marks:
        return "as its table"
    return "yes" if marks[0] is Identity.SEMANTIC else "no"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "**needed**"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        own = value.model_dump(exclude_defaults=True)
        return f"that of {_link(type(value))}" + (f", with `{json.dumps(own)}`" if own else "")
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _type_of(field: FieldInfo) -> str:
    return _with_limits(_named(field.annotation), field.metadata)


def _named(annotation: Any) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_limits(_named(arguments[0]), annotation.__metadata__)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(name for argument in arguments if (name := _named(argument))))
    if origin is Ref:
        return f"stage: {arguments[0].__name__}"
    if origin in (list, tuple):
        return f"list of: {_named(arguments[0])}"
    if origin is dict:
        return f"table of: {_named(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, InputFile):
        return "path or glob"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _link(annotation)
    return PLAIN.get(annotation, "anything")


def _with_limits(name: str, metadata: Any) -> str:
    found = [(getattr(limit, kind, None), text) for kind, text in LIMITS.items() for limit in metadata]
    return ", ".join([name, *(text.format(value) for value, text in found if value is not None)])


def _link(model: type[BaseModel]) -> str:
    return f"[{model.__name__}](#{model.__name__.lower()})"


def _on_one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("<", "&lt;")
