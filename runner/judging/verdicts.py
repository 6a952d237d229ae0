"""What a plan says of gates: sentences for single ones, and a table of every attempt against every gate."""

from runner.expand import Attempts
from runner.judging import settings
from runner.plan import Entry, Plan

OUTCOMES = {True: "passed", False: "failed", None: "not judged yet"}


def table(plan: Plan, family: Attempts) -> list[str]:
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
        rows.append([family.names[number][family.stage], family.told(number), *cells, _outcome(plan, family, number)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _outcome(plan: Plan, family: Attempts, number: int) -> str:
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
    lines += [line for family in _attempts(plan) if not plan.is_lost(family) for line in table(plan, family)]
    return lines if _is_lost_sweep(plan) else [*lines, *settings.lines(plan)]


def failed(plan: Plan) -> list[str]:
    """What to tell of gates that fail, and of attempts or settings that all failed: the run cannot end well."""
    lines = [
        f"{entry.name}: {verdict}" for entry in plan if plan.family_of(entry.name) is None for verdict in entry.failed_gates
    ]
    for family in _attempts(plan):
        if plan.is_lost(family):
            lines += [*table(plan, family), f"no attempt of {family.stage} passed its gates, so none of them is taken"]
    if _is_lost_sweep(plan):
        lines += [f"{entry.name}: {verdict}" for entry in plan if _is_of_sweep(plan, entry) for verdict in entry.failed_gates]
        lines += [*settings.lines(plan), "no setting of the sweep passed its gates, so none of them is taken"]
    return lines


def attempts(plan: Plan) -> list[str]:
    """The tables of all attempts, each after an empty line."""
    return [line for family in _attempts(plan) for line in ("", *table(plan, family))]


def _attempts(plan: Plan) -> list[Attempts]:
    """Those of which the plan has any stage that judges."""
    attempts = [family for family in plan.recipe.families.values() if isinstance(family, Attempts)]
    return [family for family in attempts if any(judge in plan.entries for judge in family.all_judges)]


def _is_lost_sweep(plan: Plan) -> bool:
    return plan.recipe.sweep is not None and plan.is_lost(plan.recipe.sweep)


def _is_of_sweep(plan: Plan, entry: Entry) -> bool:
    return plan.recipe.sweep is not None and plan.family_of(entry.name) is plan.recipe.sweep
