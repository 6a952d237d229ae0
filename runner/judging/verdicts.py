"""What a plan says of gates: sentences for single ones, and a table of every attempt against every gate."""

from runner.expand import Attempts
from runner.plan import Plan

OUTCOMES = {True: "passed", False: "failed", None: "not judged yet"}


def table(plan: Plan, family: Attempts) -> list[str]:
    """Lines with an attempt each: what it changes, what it scored in every gate, and what became of it."""
    verdicts = [
        [verdict for judge in family.judges_of(number) if judge in plan.entries for verdict in plan.entries[judge].verdicts]
        for number in range(len(family.tries))
    ]
    gates = [verdict.gate for verdict in max(verdicts, key=len)]
    rows = [[family.stage, "", *gates, ""]]
    for number, found in enumerate(verdicts):
        told = [f"{verdict.found} {OUTCOMES[verdict.passed]}" for verdict in found]
        cells = told if len(told) == len(gates) else ["not known"] * len(gates)
        rows.append([family.branch(number)[family.stage], family.told(number), *cells, _outcome(plan, family, number)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _outcome(plan: Plan, family: Attempts, number: int) -> str:
    relied_on = plan.standing[family.stage]
    passed = plan.outcome(family, number)
    if number > relied_on:
        return "not needed" if plan.outcome(family, relied_on) else "waits"
    return OUTCOMES[passed]


def passed(plan: Plan) -> list[str]:
    """What to tell of gates that hold, and of attempts where not all failed."""
    lines = [
        f"{entry.name}: {verdict}"
        for entry in plan
        if plan.attempt_of(entry.name) is None
        for verdict in entry.verdicts
        if verdict.passed
    ]
    return [*lines, *(line for family in _attempts(plan) if not _is_lost(plan, family) for line in table(plan, family))]


def failed(plan: Plan) -> list[str]:
    """What to tell of gates that fail, and of attempts that all failed: the run cannot end well."""
    lines = [
        f"{entry.name}: {verdict}" for entry in plan if plan.attempt_of(entry.name) is None for verdict in entry.failed_gates
    ]
    for family in _attempts(plan):
        if _is_lost(plan, family):
            lines += [*table(plan, family), f"no attempt of {family.stage} passed its gates, so none of them is taken"]
    return lines


def attempts(plan: Plan) -> list[str]:
    """The tables of all attempts, each after an empty line."""
    return [line for family in _attempts(plan) for line in ("", *table(plan, family))]


def _attempts(plan: Plan) -> list[Attempts]:
    """Those of which the plan has any stage that judges."""
    return [family for family in plan.recipe.attempts.values() if any(judge in plan.entries for judge in family.all_judges)]


def _is_lost(plan: Plan, family: Attempts) -> bool:
    return plan.outcome(family, plan.standing[family.stage]) is False
