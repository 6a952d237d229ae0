"""`run RECIPE`: does what is not in the cache."""

import argparse
from pathlib import Path

from runner.errors import RecipeError
from runner.options import (
    add_cache_option,
    add_recipe_options,
    add_remote_option,
    add_stage_argument,
    recipe_of,
    remote_of,
    stage_named,
    store_of,
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """What may follow the verb."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    add_recipe_options(sub)
    add_cache_option(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    add_stage_argument(sub, "--force", help="make its artifact again", action="append", default=[])
    add_remote_option(sub)
    sub.add_argument("--json", action="store_true", help="for programs: one JSON object per event, on standard output")
    sub.add_argument("--processes", metavar="N", help="processes of each training, instead of [parallel]")


def main(options: argparse.Namespace) -> int:
    """Does what is not in the cache."""
    from runner.cost import expected_seconds
    from runner.execute import Execution
    from runner.progress import make_progress
    from runner.stage_run import StopRequest

    recipe, store = recipe_of(options), store_of(options)
    for name in [*options.force, *([options.until] if options.until else [])]:
        stage_named(recipe, name)
    if options.until:
        for name in options.force:
            if not recipe.needed(options.until).issuperset(recipe.names_of(name)):
                raise RecipeError(f"--force {name}: wants a stage that --until {options.until} runs")
    remote = remote_of(options, recipe)
    progress = make_progress(lambda: expected_seconds(recipe, store), as_json=options.json)
    stop = StopRequest()
    stop.install()
    try:
        Execution(recipe, store, progress, stop, remote=remote).run(until=options.until, force=options.force)
    finally:
        progress.close()
    return 0
