"""What a plan says about gates: a line for each verdict, a table of attempts, and a table of a sweep's settings."""

from collections.abc import Iterable, Mapping
from typing import Any

from runner.planning.plan import Entry, Plan
from runner.planning.text_table import text_table
from runner.recipe.branches import Attempts, Sweep
from runner.recipe.validation import shown

OUTCOMES = {True: "passed", False: "failed", None: "not judged yet"}


def passed(plan: Plan) -> list[str]:
    """Lines on gates that hold, and on attempts and settings of which not all failed."""
    single = [entry for entry in plan if plan.family_of(entry.name) is None]
    lines = [f"{entry.name}: {verdict}" for entry in single for verdict in entry.verdicts if verdict.passed]
    lines += [line for family in _attempts(plan) if not plan.all_failed(family) for line in attempts_table(plan, family)]
    return lines if _is_lost_sweep(plan) else [*lines, *sweep_table(plan)]


def failed(plan: Plan) -> list[str]:
    """Lines on gates that fail, and on attempts or settings that all failed: with these the run ends in a GateError."""
    single = [entry for entry in plan if plan.family_of(entry.name) is None]
    lines = [f"{entry.name}: {verdict}" for entry in single for verdict in entry.failed_gates]
    for family in _attempts(plan):
        if plan.all_failed(family):
            lines += [*attempts_table(plan, family), f"no attempt of {family.stage} passed its gates, so none is used"]
    if _is_lost_sweep(plan):
        settings = [entry for entry in plan if plan.family_of(entry.name) is plan.recipe.sweep]
        lines += [f"{entry.name}: {verdict}" for entry in settings for verdict in entry.failed_gates]
        lines += [*sweep_table(plan), "no setting of the sweep passed its gates, so none is used"]
    return lines


def cures(plan: Plan) -> list[str]:
    """What helps a model that is not better than a baseline of words, a line for each failed gate that asks it to be."""
    found = []
    for entry in plan:
        for verdict in entry.failed_gates:
            difference, ends = getattr(verdict, "difference", None), getattr(verdict, "interval", None)
            other = plan.entries.get(difference[1]) if difference else None
            if difference is None or other is None or other.stage.kind != "baseline" or not plan.is_in_use(entry.name):
                continue
            chance = ends is not None and ends[0] <= 0 <= ends[1]
            doubt = "; with so few test rows that may be chance" if chance else ""
            found.append(
                f"{entry.name}: {-difference[0]:.4g} below {other.name}, which knows nothing but words and learns in seconds"
                f"{doubt}. More rows help most, then longer training (`run new --minutes`) and a model that has read more to "
                "start from (`run new --base HuggingFaceTB/SmolLM2-135M`)"
            )
    return found


def attempts(plan: Plan) -> list[str]:
    """The tables of all attempts, each after an empty line."""
    return [line for family in _attempts(plan) for line in ("", *attempts_table(plan, family))]


def attempts_table(plan: Plan, family: Attempts) -> list[str]:
    """A line per attempt: what it changes, its score in every gate, and its outcome."""
    verdicts = [
        [verdict for judge in family.judges_of(number) if judge in plan.entries for verdict in plan.entries[judge].verdicts]
        for number in range(len(family.names))
    ]
    gates = [verdict.gate for verdict in max(verdicts, key=len)]
    rows = [[family.stage, "", *gates, ""]]
    for number, judged in enumerate(verdicts):
        cells = [f"{verdict.found} {OUTCOMES[verdict.passed]}" for verdict in judged]
        if len(cells) < len(gates):
            cells = ["not known"] * len(gates)
        rows.append(
            [family.names[number][family.stage], family.describe(number), *cells, _attempt_outcome(plan, family, number)]
        )
    return text_table(rows)


def sweep_table(plan: Plan) -> list[str]:
    """What decides, and the settings below; nothing without a sweep, or if the plan has none of its evaluations."""
    sweep = plan.recipe.sweep
    if sweep is None or not any(judge in plan.entries for judge in sweep.all_judges):
        return []
    return [f"sweep, {sweep.criterion}:", *text_table(sweep_rows(plan, sweep))]


def sweep_rows(plan: Plan, sweep: Sweep) -> list[list[str]]:
    """A head, and a row per setting: its values, its scores (the deciding one first), and its outcome."""
    judges = [plan.entries.get(sweep.judges_of(number)[0]) for number in range(len(sweep.names))]
    metrics = [judge.record.data["metrics"] if judge and judge.record else {} for judge in judges]
    names = dict.fromkeys([sweep.score, *(name for one in metrics for name in one.get("scores", {}))])
    rows = [["setting", *map(str, sweep.axes), *names, ""]]
    for number, of_setting in enumerate(metrics):
        values = [shown(value) for value in sweep.values(number)]
        scores = [score_text(of_setting, name) for name in names]
        rows.append([sweep.judges_of(number)[0], *values, *scores, _setting_outcome(plan, sweep, number)])
    return rows


def score_table(entries: Iterable[Entry]) -> list[list[str]]:
    """A head, and a row per score with its value in each evaluation; nothing where there are no scores."""
    found = {entry.name: entry.record.data["metrics"] for entry in entries if entry.record}
    found = {name: metrics for name, metrics in found.items() if metrics.get("scores")}
    names = dict.fromkeys(name for metrics in found.values() for name in metrics["scores"])
    rows = [[name, *(score_text(metrics, name) for metrics in found.values())] for name in names]
    return [["score", *found], *rows] if rows else []


def cut_rows(entries: Iterable[Entry]) -> list[list[str]]:
    """For each training that cut rows, its name and what was cut of the rows to learn from or of the held-out ones."""
    found = []
    for entry in entries:
        metrics = entry.record.data["metrics"] if entry.record else {}
        for name, what in (("data", ""), ("validation_data", "held out: ")):
            if sentence := metrics.get(name, {}).get("cut"):
                found.append([entry.name, what + sentence])
    return found


def score_text(metrics: Mapping[str, Any], name: str) -> str:
    """`0.8123 [0.79, 0.83]`, with the interval where there is one; empty without the score."""
    value, interval = metrics.get("scores", {}).get(name), metrics.get("intervals", {}).get(name)
    if value is None:
        return ""
    return f"{value:.4g}" + (f" [{', '.join(f'{end:.4g}' for end in interval)}]" if interval else "")


def _setting_outcome(plan: Plan, sweep: Sweep, number: int) -> str:
    if number == plan.decided[sweep.stage]:
        return "best"
    entry = plan.entries.get(sweep.judges_of(number)[0])
    if entry is None or entry.record is None:
        return entry.state if entry else "not asked for"
    return {False: "failed its gates", None: "not judged yet", True: ""}[plan.outcome(sweep, number)]


def _attempt_outcome(plan: Plan, family: Attempts, number: int) -> str:
    current = plan.selected[family.stage]
    if number > current:
        return "not needed" if plan.outcome(family, current) else "waits"
    return OUTCOMES[plan.outcome(family, number)]


def _attempts(plan: Plan) -> list[Attempts]:
    """Those that the plan has at least one evaluation of."""
    attempts = [family for family in plan.recipe.families.values() if isinstance(family, Attempts)]
    return [family for family in attempts if any(judge in plan.entries for judge in family.all_judges)]


def _is_lost_sweep(plan: Plan) -> bool:
    return plan.recipe.sweep is not None and plan.all_failed(plan.recipe.sweep)
