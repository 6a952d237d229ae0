"""`run plan RECIPE`: the state of each stage, and why."""

import argparse
import json
from pathlib import Path

from runner.options import add_cache_option, add_recipe_options, add_stage_argument, recipe_of, stage_named, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """What may follow the verb."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    add_recipe_options(sub)
    add_cache_option(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    sub.add_argument("--json", action="store_true", help="for programs")


def main(options: argparse.Namespace) -> int:
    """Shows the state of each stage, and why."""
    from runner.plan import Plan, as_json

    recipe = recipe_of(options)
    if options.until:
        stage_named(recipe, options.until)
    made = Plan(recipe, store_of(options), until=options.until)
    if options.json:
        print(json.dumps(as_json(recipe, made), indent=2, ensure_ascii=False))
        return 0
    widths = [
        max(len(text) for text in column) for column in zip(*((e.name, e.stage.kind, e.state) for e in made), strict=True)
    ]
    for entry in made:
        name, kind, state = (
            text.ljust(width) for text, width in zip((entry.name, entry.stage.kind, entry.state), widths, strict=True)
        )
        print(f"{name}  {kind}  {state}  {entry.reason}".rstrip())
    return 0
