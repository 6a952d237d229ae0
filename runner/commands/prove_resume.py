"""`run prove-resume RECIPE STAGE`: a training that is killed and resumed ends like an uninterrupted one."""

import argparse
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_stage_argument, recipe_of, store_of
from runner.terminal import console

DIFFERENT = 3  # exit code
STEPS = 16  # by default
SHOWN = 5  # names of parts that differ


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub)
    sub.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"steps to train (default: {STEPS})")
    sub.add_argument("--processes", metavar="N", help="processes of the training, instead of [parallel]")
    sub.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Trains a few steps of a stage with and without a kill, and compares the results bit for bit."""
    from runner.diagnostics.resume_check import prove, sentence

    if options.steps < 1:
        raise RecipeError(f"--steps: expected at least 1, got {options.steps}")
    recipe = recipe_of(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it also ends the workers and removes their folder
    proof = prove(
        recipe, store_of(options), options.stage, steps=options.steps, tell=lambda text: print(text, file=sys.stderr)
    )
    if options.json:
        print(json.dumps(proof, indent=2, ensure_ascii=False))
    else:
        _show(proof)
        print(f"{options.stage}: {sentence(proof)}")
    return 0 if proof["equal"] else DIFFERENT


def _show(proof: Mapping[str, Any]) -> None:
    from rich.table import Table

    title = f"{proof['stage']} ({proof['kind']}), {proof['steps']} steps"
    table = Table("compared", "size", "with and without a kill", title=title, title_justify="left")
    for check in proof["checks"]:
        different = check["different"]
        more = f" and {len(different) - SHOWN:,} more" if len(different) > SHOWN else ""
        table.add_row(
            check["name"], check["what"], f"different: {', '.join(different[:SHOWN])}{more}" if different else "equal"
        )
    console(sys.stdout).print(table)
