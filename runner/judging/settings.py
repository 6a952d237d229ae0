"""What a plan says of a sweep: a table of every setting against its scores, and which of them is the best."""

from collections.abc import Mapping
from typing import Any

from runner.expand import Sweep
from runner.plan import Plan
from runner.reading.faults import shown


def rows(plan: Plan, sweep: Sweep) -> list[list[str]]:
    """A head, and a row for each setting: what it has for each field, what it scored (first what decides), and the outcome."""
    judges = [plan.entries.get(sweep.judges_of(number)[0]) for number in range(len(sweep.names))]
    found = [judge.record.data["metrics"] if judge and judge.record else {} for judge in judges]
    scores = [sweep.score, *dict.fromkeys(name for one in found for name in one.get("scores", {}) if name != sweep.score)]
    table = [["setting", *map(str, sweep.axes), *scores, ""]]
    for number, metrics in enumerate(found):
        values = [shown(value) for value in sweep.values(number)]
        told = [_score(metrics, score) for score in scores]
        table.append([sweep.judges_of(number)[0], *values, *told, _outcome(plan, sweep, number)])
    return table


def lines(plan: Plan) -> list[str]:
    """The table in columns, below what decides; nothing where the recipe has no sweep or the plan none of its evaluations."""
    sweep = plan.recipe.sweep
    if sweep is None or not any(judge in plan.entries for judge in sweep.all_judges):
        return []
    table = rows(plan, sweep)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [f"sweep, {sweep.wanted}:", *told]


def _score(metrics: Mapping[str, Any], name: str) -> str:
    value, ends = metrics.get("scores", {}).get(name), metrics.get("intervals", {}).get(name)
    return "" if value is None else _number(value) + (f" [{', '.join(map(_number, ends))}]" if ends else "")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _outcome(plan: Plan, sweep: Sweep, number: int) -> str:
    if number == plan.taken[sweep.stage]:
        return "best"
    entry = plan.entries.get(sweep.judges_of(number)[0])
    if entry is None or entry.record is None:
        return entry.state if entry else "not asked for"
    return {False: "failed its gates", None: "not judged yet", True: ""}[plan.outcome(sweep, number)]
