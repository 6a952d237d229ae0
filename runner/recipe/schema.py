"""The JSON Schema of recipes, for editors, from the classes that validate them and the docstrings of their fields."""

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from runner.recipe.head import Head
from runner.recipe.validation import models_in
from runner.stages import stage_kinds


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, every kind of stage included."""
    kinds = stage_kinds()
    tables: list[type[BaseModel]] = [Head, *kinds.values()]
    models = with_nested(tables)
    places, definitions = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    definitions = definitions["$defs"]
    found = {model: definitions[places[model, "validation"]["$ref"].removeprefix("#/$defs/")] for model in models}
    for model, table in found.items():
        for field, text in docstrings(model).items():
            table["properties"][field] = dict(sorted({**table["properties"][field], "description": text}.items()))
    for kind, model in kinds.items():
        table = found[model]
        table["properties"] = {"kind": {"const": kind, "description": model.__doc__ or ""}, **table.get("properties", {})}
        table["required"] = ["kind", *table.get("required", [])]
    variants = [places[kinds[kind], "validation"] for kind in sorted(kinds)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stockpot recipe",
        "type": "object",
        "properties": {
            **found[Head]["properties"],
            "extends": {"type": "string", "description": "Another recipe, over which this one is merged."},
            "stage": {"type": "object", "additionalProperties": {"oneOf": variants}, "minProperties": 1},
        },
        "required": ["stage"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def with_nested(tables: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """`tables` and all tables nested in their fields, each once."""
    found = dict.fromkeys(tables)
    for table in tables:
        for field in table.model_fields.values():
            found |= dict.fromkeys(with_nested([model for model in models_in(field.annotation) if model not in found]))
    return list(found)


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring of each field, from the source of `model` and of the classes that it inherits from.

    pydantic can collect them too, but does so when each class is defined, which took a fifth of the time of planning.
    """
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        (table,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(table, ast.ClassDef)
        for field, below in pairwise(table.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return {name: text for name, text in found.items() if name in model.model_fields}
