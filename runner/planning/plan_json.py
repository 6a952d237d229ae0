"""A plan as JSON: `run plan --json`."""

from typing import Any

from runner.planning.plan import Entry, Plan
from runner.recipe.branches import Sweep


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "recipe": plan.recipe.head.name,
        "stages": [
            {
                "name": entry.name,
                "kind": entry.stage.kind,
                "state": entry.state,
                "reason": entry.reason,
                "key": entry.key,
                "path": str(entry.path) if entry.path else None,
                **_judgement_as_json(plan, entry),
            }
            for entry in plan
        ],
        **({"sweep": _sweep_as_json(plan, sweep)} if (sweep := plan.recipe.sweep) else {}),
    }


def _judgement_as_json(plan: Plan, entry: Entry) -> dict[str, Any]:
    """The gates of a stage, and its branch: which one, and whether later stages use it."""
    found: dict[str, Any] = {}
    if entry.verdicts:
        found["gates"] = [
            {"gate": verdict.gate, "found": verdict.found, "passed": verdict.passed} for verdict in entry.verdicts
        ]
    family = plan.family_of(entry.name)
    if isinstance(family, Sweep):
        numbers = [number + 1 for number in family.numbers[entry.name]]
        found["setting"] = {"numbers": numbers, "stands": plan.is_in_use(entry.name)}
    elif family is not None:
        number = family.numbers[entry.name][0]
        found["attempt"] = {
            "of": family.stage,
            "number": number + 1,
            "changes": family.describe(number),
            "stands": plan.is_in_use(entry.name),
        }
    return found


def _sweep_as_json(plan: Plan, sweep: Sweep) -> dict[str, Any]:
    """The settings of a sweep with values, score and outcome; `number` and `best` count from 1."""
    best = plan.decided[sweep.stage]
    settings = [
        {
            "number": number + 1,
            "values": {str(axis): value for axis, value in zip(sweep.axes, sweep.values(number), strict=True)},
            "score": plan.score(sweep, number),
            "passed": plan.outcome(sweep, number),
        }
        for number in range(len(sweep.names))
    ]
    return {"wanted": sweep.criterion, "best": None if best is None else best + 1, "settings": settings}
