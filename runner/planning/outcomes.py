"""What a plan says of gates: sentences for single ones, and a table of every attempt against every gate."""

from collections.abc import Mapping
from typing import Any

from runner.planning.plan import Entry, Plan
from runner.recipe.branches import Attempts, Sweep
from runner.recipe.validation import shown


def sweep_rows(plan: Plan, sweep: Sweep) -> list[list[str]]:
    """A head, and a row for each setting: what it has for each field, what it scored (first what decides), and the outcome."""
    judges = [plan.entries.get(sweep.judges_of(number)[0]) for number in range(len(sweep.names))]
    found = [judge.record.data["metrics"] if judge and judge.record else {} for judge in judges]
    scores = [sweep.score, *dict.fromkeys(name for one in found for name in one.get("scores", {}) if name != sweep.score)]
    table = [["setting", *map(str, sweep.axes), *scores, ""]]
    for number, metrics in enumerate(found):
        values = [shown(value) for value in sweep.values(number)]
        told = [_score(metrics, score) for score in scores]
        table.append([sweep.judges_of(number)[0], *values, *told, _setting_outcome(plan, sweep, number)])
    return table


def sweep_table(plan: Plan) -> list[str]:
    """The table in columns, below what decides; nothing where the recipe has no sweep or the plan none of its evaluations."""
    sweep = plan.recipe.sweep
    if sweep is None or not any(judge in plan.entries for judge in sweep.all_judges):
        return []
    table = sweep_rows(plan, sweep)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [f"sweep, {sweep.wanted}:", *told]


def _score(metrics: Mapping[str, Any], name: str) -> str:
    value, ends = metrics.get("scores", {}).get(name), metrics.get("intervals", {}).get(name)
    return "" if value is None else _number(value) + (f" [{', '.join(map(_number, ends))}]" if ends else "")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _setting_outcome(plan: Plan, sweep: Sweep, number: int) -> str:
    if number == plan.taken[sweep.stage]:
        return "best"
    entry = plan.entries.get(sweep.judges_of(number)[0])
    if entry is None or entry.record is None:
        return entry.state if entry else "not asked for"
    return {False: "failed its gates", None: "not judged yet", True: ""}[plan.outcome(sweep, number)]


OUTCOMES = {True: "passed", False: "failed", None: "not judged yet"}


def attempts_table(plan: Plan, family: Attempts) -> list[str]:
    """Lines with an attempt each: what it changes, what it scored in every gate, and what became of it."""
    verdicts = [
        [verdict for judge in family.judges_of(number) if judge in plan.entries for verdict in plan.entries[judge].verdicts]
        for number in range(len(family.names))
    ]
    gates = [verdict.gate for verdict in max(verdicts, key=len)]
    rows = [[family.stage, "", *gates, ""]]
    for number, found in enumerate(verdicts):
        told = [f"{verdict.found} {OUTCOMES[verdict.passed]}" for verdict in found]
        cells = told if len(told) == len(gates) else ["not known"] * len(gates)
        rows.append([family.names[number][family.stage], family.told(number), *cells, _attempt_outcome(plan, family, number)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _attempt_outcome(plan: Plan, family: Attempts, number: int) -> str:
    relied_on = plan.standing[family.stage]
    passed = plan.outcome(family, number)
    if number > relied_on:
        return "not needed" if plan.outcome(family, relied_on) else "waits"
    return OUTCOMES[passed]


def passed(plan: Plan) -> list[str]:
    """What to tell of gates that hold, and of attempts and settings where not all failed."""
    lines = [
        f"{entry.name}: {verdict}"
        for entry in plan
        if plan.family_of(entry.name) is None
        for verdict in entry.verdicts
        if verdict.passed
    ]
    lines += [line for family in _attempts(plan) if not plan.is_lost(family) for line in attempts_table(plan, family)]
    return lines if _is_lost_sweep(plan) else [*lines, *sweep_table(plan)]


def failed(plan: Plan) -> list[str]:
    """What to tell of gates that fail, and of attempts or settings that all failed: the run cannot end well."""
    lines = [
        f"{entry.name}: {verdict}" for entry in plan if plan.family_of(entry.name) is None for verdict in entry.failed_gates
    ]
    for family in _attempts(plan):
        if plan.is_lost(family):
            lines += [
                *attempts_table(plan, family),
                f"no attempt of {family.stage} passed its gates, so none of them is taken",
            ]
    if _is_lost_sweep(plan):
        lines += [f"{entry.name}: {verdict}" for entry in plan if _is_of_sweep(plan, entry) for verdict in entry.failed_gates]
        lines += [*sweep_table(plan), "no setting of the sweep passed its gates, so none of them is taken"]
    return lines


def attempts(plan: Plan) -> list[str]:
    """The tables of all attempts, each after an empty line."""
    return [line for family in _attempts(plan) for line in ("", *attempts_table(plan, family))]


def _attempts(plan: Plan) -> list[Attempts]:
    """Those of which the plan has any stage that judges."""
    attempts = [family for family in plan.recipe.families.values() if isinstance(family, Attempts)]
    return [family for family in attempts if any(judge in plan.entries for judge in family.all_judges)]


def _is_lost_sweep(plan: Plan) -> bool:
    return plan.recipe.sweep is not None and plan.is_lost(plan.recipe.sweep)


def _is_of_sweep(plan: Plan, entry: Entry) -> bool:
    return plan.recipe.sweep is not None and plan.family_of(entry.name) is plan.recipe.sweep
