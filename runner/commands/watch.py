"""`run watch RECIPE`: what a run that was started elsewhere is doing."""

import argparse
from pathlib import Path

from runner.options import add_cache_option, add_recipe_options, make_view, recipe_of, store_of
from runner.reporting.watch import Watch


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    sub.add_argument("--patience", type=float, metavar="SECONDS", help="end when nothing has run for so long; else never")
    sub.add_argument("--json", action="store_true", help="for programs: one JSON object per event")
    add_recipe_options(sub)
    add_cache_option(sub)


def main(options: argparse.Namespace) -> int:
    """Watches a run that was started elsewhere on the same cache, until all is done; 1 if patience ended before."""
    recipe, store = recipe_of(options), store_of(options)
    from runner.planning.cost import expected_seconds

    progress = make_view(lambda: expected_seconds(recipe, store), as_json=options.json)
    try:
        return 0 if Watch(recipe, store, progress).until_done(patience=options.patience) else 1
    finally:
        progress.close()
