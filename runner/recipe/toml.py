"""TOML files to one table: a recipe merged over those it extends, with `--set` applied. Nothing is validated here.

Every string remembers the folder of the file it was written in.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import tomli

from runner.errors import RecipeError
from runner.files import read_bounded
from runner.input_files import AllowedFolders, Located
from runner.recipe.validation import shown

DEPTH = 50  # of tables and lists
LARGEST = 4 << 20  # bytes of a recipe, of which lists of tables take 50 times as much in memory; the longest here has 12,000
LONGEST_CHAIN = 20  # of recipes that extend each other
ALTERNATIVES = frozenset({"budget"})  # tables with one of several fields: a recipe's replaces that of the one it extends


def read_with_parents(path: Path, children: tuple[Path, ...], folders: AllowedFolders) -> dict[str, Any]:
    """The table of a file merged over that of the file it extends."""
    path = path.resolve()
    if path in children:
        chain = " -> ".join(child.name for child in (*children, path))
        raise RecipeError(f"{children[-1]}: extends: expected a file that does not extend this one, got {chain}")
    if len(children) > LONGEST_CHAIN:
        raise RecipeError(f"{path}: expected at most {LONGEST_CHAIN} recipes that extend each other, got more")
    try:
        if len(text := read_bounded(path, LARGEST)) > LARGEST:
            raise RecipeError(f"{path}: expected a recipe of at most {LARGEST:,} bytes, got more")
        table = tomli.loads(text.decode())
    except FileNotFoundError as error:
        by = f", which {children[-1].name} extends" if children else ""
        raise RecipeError(f"{path}: no such recipe{by}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error
    except (ValueError, RecursionError) as error:  # of TOML, and of a number with too many digits
        raise RecipeError(f"{path}: is not TOML: {error}") from error
    if is_too_deep(table):
        raise RecipeError(f"{path}: expected tables and lists at most {DEPTH} deep, got deeper ones")
    located: dict[str, Any] = _nested_sweep(_locate(table, path.parent))
    parent = located.pop("extends", None)
    if parent is None:
        return located
    if not isinstance(parent, Located) or not parent or "\0" in parent:
        raise RecipeError(f"{path}: extends: expected the path of a recipe, got {shown(parent)}")
    if not folders.contain(parent.folder / parent):
        raise RecipeError(f"{path}: extends: {folders.fault(parent, parent.folder / parent)}")
    return merged(read_with_parents(parent.folder / parent, (*children, path), folders), located)


def is_too_deep(value: Any, depth: int = 0) -> bool:
    """Whether tables and lists are nested deeper than DEPTH, which only a file that is meant to do harm has."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > DEPTH or any(is_too_deep(item, depth + 1) for item in inner)


def _locate(value: Any, folder: Path) -> Any:
    match value:
        case str():
            return Located(value, folder)
        case dict():
            return {key: _locate(item, folder) for key, item in value.items()}
        case list():
            return [_locate(item, folder) for item in value]
    return value


def _nested_sweep(table: dict[str, Any]) -> dict[str, Any]:
    """The table with "stage.NAME.FIELD" of [sweep] as nested tables, so that they merge and `--set` reaches them."""
    sweep = table.get("sweep")
    if not isinstance(sweep, dict):
        return table
    nested_sweep: dict[str, Any] = {}
    for key, value in sweep.items():
        first, *rest = key.split(".")
        is_dotted = first == "stage" and len(rest) > 1 and all(rest)
        nested_sweep = merged(nested_sweep, nested([first, *rest] if is_dotted else [key], value))
    return {**table, "sweep": nested_sweep}


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """A value at `path` in nested tables."""
    table: dict[str, Any] = reduce(lambda inner, part: {part: inner}, reversed(path), value)
    return table


def leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values in nested tables, each with its path; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` merged over `below`: tables merge deeply; lists, plain values and tables of alternatives replace."""
    both = {**below, **above}
    for key in (below.keys() & above.keys()) - ALTERNATIVES:
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def apply_override(table: dict[str, Any], override: str, path: Path) -> None:
    """Apply `key.path=value` from the command line to `table`; the value is read as TOML, else as a string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set: expected KEY=VALUE with a dotted key, such as stage.base.seed=1, got {override!r}")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[: depth + 1])}: expected a table, got a value")
    table[parts[-1]] = _locate(value, path.resolve().parent)
