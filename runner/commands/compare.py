"""`run compare A B`: what differs between two recipes or results: fields, scores and costs."""

import argparse
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.cache.record import DamagedRecordError, Record
from runner.errors import RecipeError
from runner.graph import changes
from runner.options import add_cache_option, add_recipe_options, recipe_of, recipe_path, store_of
from runner.planning.comparison import Difference, Records, costs, differences
from runner.planning.plan import Plan
from runner.planning.text_table import text_table
from runner.reporting.progress import duration


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = "a recipe, the folder of a finished stage, or a record"
    sub.add_argument("before", type=recipe_path, metavar="A", help=what)
    sub.add_argument("after", type=recipe_path, metavar="B", help="another one; or the same recipe, to see what --set changes")
    add_recipe_options(sub)
    add_cache_option(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class _Side:
    """One of the two: its fields, and the records of what is finished."""

    fields: Mapping[str, Any]
    records: Records
    missing: Sequence[str] = ()  # stages that are not finished


def main(options: argparse.Namespace) -> int:
    """Compares two recipes (--set changes B), or two results: fields, scores with intervals of their difference, and costs.

    Exits with 1 if a field differs.
    """
    plain = copy.copy(options)
    plain.overrides = []  # --set applies to B only
    a, b = _side(plain, options.before), _side(options, options.after)
    fields, scores, spent = changes(a.fields, b.fields), list(differences(a.records, b.records)), costs(a.records, b.records)
    if options.json:
        told = [{**asdict(one), "difference": one.change, "verdict": one.verdict} for one in scores]
        print(json.dumps({"fields": fields, "scores": told, "costs": spent}, indent=2, ensure_ascii=False))
        return 1 if fields else 0
    for line in fields:
        print(line)
    if a.records and b.records:
        for line in ("", *_score_lines(scores), "", *_cost_lines(spent)):
            print(line)
    for name, side in (("A", a), ("B", b)):
        if side.missing and (a.records or b.records):
            print(f"{name} is not finished: {', '.join(side.missing)}")
    return 1 if fields else 0


def _side(options: argparse.Namespace, path: Path) -> _Side:
    record = path / "record.json" if path.is_dir() else path
    if record.suffix == ".json":
        return _of_record(record)
    options = copy.copy(options)
    options.recipe = path
    recipe = recipe_of(options, path)
    plan = Plan(recipe, store_of(options))
    missing = [entry.name for entry in plan if entry.record is None and not plan.is_needless(entry.name)]
    return _Side(recipe.resolved(), {entry.name: entry.record.data for entry in plan if entry.record is not None}, missing)


def _of_record(path: Path) -> _Side:
    try:
        data = Record.read(path).data
    except FileNotFoundError:
        raise RecipeError(f"{path}: expected a recipe, the folder of a finished stage, or a record, got none") from None
    except DamagedRecordError as error:
        raise RecipeError(f"{path}: {error}") from error
    return _Side(data["identity"], {str(data["kind"]): data})  # names of stages may differ, kinds do not


def _score_lines(scores: Sequence[Difference]) -> Iterator[str]:
    rows = [[one.name, _number(one.a), _number(one.b), *_change(one)] for one in scores]
    if rows:
        yield from text_table([["score", "A", "B", "B - A", "95% interval", ""], *rows])
    if any(one.rows == "other" for one in scores):
        yield "A and B scored other rows where it says so: those intervals are not paired, and wider"


def _change(one: Difference) -> list[str]:
    if one.change is None:
        return ["", "", ""]
    ends = f"[{one.interval[0]:+.4g}, {one.interval[1]:+.4g}]" if one.interval else ""
    told = [part for part in (one.verdict, "other rows" if one.rows == "other" else "") if part]
    return [f"{one.change:+.4g}", ends, ", ".join(told)]


def _cost_lines(spent: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["stage", "A", "B", "tokens A", "B", "memory A", "B"]]
    for one in spent:
        sides = [{} if one["shared"] else one["b"]]
        cells = [
            [show(side.get(name)) for side in (one["a"], *sides)]
            for name, show in (("seconds", _time), ("tokens", _count), ("peak_memory_bytes", _memory))
        ]
        rows.append([one["stage"], *(cell for pair in cells for cell in pair)])
        if one["shared"]:
            rows[-1][2] = "the same"
    return text_table(rows)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(float(seconds))


def _count(number: float | None) -> str:
    return "" if number is None else f"{int(number):,}"


def _memory(number: float | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
