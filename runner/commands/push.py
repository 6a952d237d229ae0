"""`run push RECIPE`: artifacts to a remote cache."""

import argparse

from runner.errors import IntegrityError
from runner.options import add_recipe_argument, add_remote_option, add_stage_argument, open_remote_of, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    add_remote_option(sub)


def main(options: argparse.Namespace) -> int:
    """Uploads the finished artifacts of a recipe to a remote cache that lacks them."""
    from runner.cache.store import Waiting
    from runner.planning.plan import Plan

    recipe = recipe_of(options)
    store, remote = store_of(options), open_remote_of(options, recipe)
    for entry in Plan(recipe, store, until=options.until):
        if entry.record is None or entry.path is None:
            print(f"{entry.name}: {entry.state}, not uploaded")
            continue
        with store.reading([entry.record], waiting=Waiting()):
            if not store.has_artifact(entry.record, reread=True):
                raise IntegrityError(f"{entry.name}: its artifact does not match its record; `run verify` shows the details")
            uploaded = remote.offer(entry.record, entry.path)
        print(f"{entry.name}: {'uploaded' if uploaded else 'already there'}", flush=True)
    return 0
