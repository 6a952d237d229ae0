"""A check of the first rows of data before anything runs: whether they have the fields that the recipe uses.

Done only when a recipe is about to run, since data of a stranger is not parsed before the user agrees.
"""

from functools import cache
from pathlib import Path

from llm.errors import InputError
from llm.text.readers import field_names
from runner.errors import RecipeError
from runner.graph import tables
from runner.recipe.recipe import Recipe
from runner.recipe.validation import nearest
from runner.stages.fields.data_tables import PreferenceTable, RowTable


def check_first_rows(recipe: Recipe) -> None:
    """RecipeError if the first row of a table's first file lacks a field, at which its stage would fail."""
    faults = []
    for name, stage in recipe.stages.items():
        for place, table in tables(stage):
            if not isinstance(table, RowTable | PreferenceTable) or table.on_bad_row == "skip":
                continue
            for path in table.files.matches()[:1]:
                found = _fields(path)
                if found is not None and (missing := sorted(table.template.fields.difference(found))):
                    faults.append(
                        f"stage.{name}.{place}: expected the field {missing[0]!r} in the rows of {path}, got only "
                        f"{', '.join(map(repr, found)) or 'no field at all'}{nearest(missing[0], found)}"
                    )
    if faults:
        raise RecipeError("\n".join(f"{recipe.path}: {fault}" for fault in faults))


@cache
def _fields(path: Path) -> list[str] | None:
    """The fields of the first row; None if it cannot be read, which its stage will report."""
    try:
        return field_names(path)
    except (InputError, OSError, ValueError):
        return None
