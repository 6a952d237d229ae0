"""The JSON Schema of recipes, for editors: made from the same classes that validate."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from runner.recipe import Head, stage_kinds


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, every kind of stage included."""
    kinds = stage_kinds()
    tables: list[type[BaseModel]] = [Head, *kinds.values()]
    places, definitions = models_json_schema([(table, "validation") for table in tables], ref_template="#/$defs/{model}")
    definitions = definitions["$defs"]
    variants = []
    for kind, model in sorted(kinds.items()):
        name = places[(model, "validation")]["$ref"].removeprefix("#/$defs/")
        table = definitions[name]
        table["properties"] = {"kind": {"const": kind, "description": model.__doc__ or ""}, **table.get("properties", {})}
        table["required"] = ["kind", *table.get("required", [])]
        variants.append({"$ref": f"#/$defs/{name}"})
    head = definitions[places[(Head, "validation")]["$ref"].removeprefix("#/$defs/")]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stockpot recipe",
        "type": "object",
        "properties": {
            **head["properties"],
            "extends": {"type": "string", "description": "Another recipe, over which this one is merged."},
            "stage": {"type": "object", "additionalProperties": {"oneOf": variants}, "minProperties": 1},
        },
        "required": ["stage"],
        "additionalProperties": False,
        "$defs": definitions,
    }
