"""`run watch RECIPE`: the view of a run that was started elsewhere."""

import argparse

from runner.errors import EXIT_INTERRUPTED
from runner.options import add_recipe_argument, make_view, recipe_of, store_of
from runner.reporting.watch import RunWatcher, running_overrides


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument(
        "--patience", type=float, metavar="SECONDS", help="exit after this time without a running stage (default: never)"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object per event")


def main(options: argparse.Namespace) -> int:
    """Watches a run on the same cache until all stages are done; exits with 1 if --patience ends first."""
    from runner.planning.cost import expected_seconds

    store = store_of(options)
    if not options.overrides:
        options.overrides = running_overrides(store, options.recipe)
    recipe = recipe_of(options)
    view = make_view(lambda: expected_seconds(recipe, store), as_json=options.json)
    try:
        return 0 if RunWatcher(recipe, store, view).until_done(patience=options.patience) else 1
    except KeyboardInterrupt:
        view.note("watching has ended; the run goes on")
        return EXIT_INTERRUPTED
    finally:
        view.close()
