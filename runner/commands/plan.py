"""`run plan RECIPE`: the state of each stage, the reason, and the estimated cost."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from runner.diagnostics.machine_speed import machine_speed
from runner.options import add_check_inputs_option, add_recipe_argument, add_stage_argument, recipe_of, store_of
from runner.planning import outcomes
from runner.planning.cost import Cost, costs, kinds_ahead, spare_stages, total
from runner.planning.data_look import check_data
from runner.planning.plan import Plan
from runner.planning.plan_json import as_json
from runner.planning.text_table import text_table
from runner.reporting.progress import brief, duration

COLUMNS = ("parameters", "tokens", "operations", "memory", "time")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_check_inputs_option(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    sub.add_argument(
        "--measure", action="store_true", help="run each kind of training for some seconds, for a better estimate of time"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Shows the state of each stage, the reason, and the estimated cost."""
    recipe, store = recipe_of(options), store_of(options)
    plan = Plan(recipe, store, until=options.until)
    check_data(plan, lambda sentence: print(sentence, file=sys.stderr))
    measured = None
    if options.measure:
        from runner.diagnostics.bench import measured_speeds

        print("measuring ...", file=sys.stderr)
        measured = measured_speeds(plan)
    found = costs(plan, store.records(kinds_ahead(plan)), measured=measured, machine=machine_speed())
    if options.json:
        shown = as_json(plan)
        for stage in shown["stages"]:
            stage["cost"] = asdict(found[stage["name"]]) if stage["name"] in found else None
        shown["cost"] = asdict(total(_needed(plan, found)))
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    settings = outcomes.sweep_table(plan)
    for line in [*table(plan, found), *outcomes.attempts(plan), *(["", *settings] if settings else []), *_cut(plan)]:
        print(line)
    return 0


def _cut(plan: Plan) -> list[str]:
    """A line for each finished training that cut rows."""
    return [f"{name}: {sentence}" for name, sentence in outcomes.cut_rows(plan)]


def table(plan: Plan, found: Mapping[str, Cost]) -> list[str]:
    """A line per stage; the columns of cost only if a stage will run."""
    rows = [["stage", "kind", "state", *(COLUMNS if found else ()), "why"]]
    for entry in plan:
        cells = _cells(found.get(entry.name)) if found else ()
        rows.append([entry.name, entry.stage.kind, entry.state, *cells, brief(entry.reason)])
    lines = text_table(rows)
    return [*lines, *_sums(plan, found)] if found else lines[1:]


def _cells(cost: Cost | None) -> Sequence[str]:
    if cost is None:
        return [""] * len(COLUMNS)
    memory = f"{cost.memory / 2**30:.1f} GiB" if cost.memory else ""
    return [_short(cost.parameters), _short(cost.tokens), _short(cost.flops), memory, _time(cost)]


def _time(cost: Cost) -> str:
    if cost.seconds is None or cost.low is None or cost.high is None:
        return "?"
    spread = f" ({duration(cost.low)} to {duration(cost.high)})" if cost.high > 1.1 * cost.low else ""
    return f"{duration(cost.seconds)}{spread}"


def _needed(plan: Plan, found: Mapping[str, Cost]) -> dict[str, Cost]:
    """Without spare attempts."""
    needless = spare_stages(plan)
    return {name: cost for name, cost in found.items() if name not in needless}


def _sums(plan: Plan, found: Mapping[str, Cost]) -> list[str]:
    needed = _needed(plan, found)
    unknown = [name for name, cost in needed.items() if cost.seconds is None]
    if unknown and len(unknown) < len(needed):
        known = {name: cost for name, cost in needed.items() if name not in unknown}
        return [
            f"total time: {_time(total(known))} for {', '.join(known)}; for the rest it is unknown, since this machine has no "
            f"record for {', '.join(unknown)}"
        ]
    if unknown:
        return [f"time: unknown, since this machine has no record for {', '.join(unknown)}; --measure may help"]
    further = ", if the first attempts pass" if len(needed) < len(found) else ""
    return [f"total time: about {_time(total(needed))}{further}, from records of this machine"]


def _short(number: float | None) -> str:
    """1234567 as 1.2M."""
    if number is None:
        return ""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}Z"
