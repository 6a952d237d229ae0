"""`run pull RECIPE`: artifacts from a remote cache."""

import argparse

from runner.options import add_recipe_argument, add_remote_option, add_stage_argument, open_remote_of, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    add_remote_option(sub)


def main(options: argparse.Namespace) -> int:
    """Fetches the missing artifacts of a recipe from a remote cache."""
    from runner.cache.store import Waiting
    from runner.planning.plan import Plan

    recipe = recipe_of(options)
    store, remote = store_of(options), open_remote_of(options, recipe)
    asked: set[str] = set()
    while unknown := [
        entry
        for entry in Plan(recipe, store, until=options.until)
        if entry.key is not None and entry.path is None and entry.key not in asked
    ]:
        for entry in unknown:
            key = str(entry.key)
            asked.add(key)
            with store.lock(entry.stage, key, waiting=Waiting()):
                record = remote.record(entry.stage.kind, key)
                if record is not None:
                    remote.fetch(record, store)
            print(f"{entry.name}: {'fetched' if record else 'not there'}", flush=True)
    return 0
