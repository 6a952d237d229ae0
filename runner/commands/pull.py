"""`run pull RECIPE`: artifacts from a remote cache."""

import argparse
from typing import TYPE_CHECKING

from runner.errors import RemoteError
from runner.options import add_recipe_argument, add_remote_option, add_stage_argument, open_remote_of, recipe_of, store_of

if TYPE_CHECKING:
    from runner.cache.remote import Remote
    from runner.cache.store import Store
    from runner.planning.plan import Entry


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
    store.origins.named.add(remote.name)
    asked, damaged = set[str](), list[str]()
    while unknown := [
        entry
        for entry in Plan(recipe, store, until=options.until)
        if entry.key is not None and entry.path is None and entry.key not in asked
    ]:
        for entry in unknown:
            key = str(entry.key)
            asked.add(key)
            with store.lock(entry.stage, key, waiting=Waiting()):
                found = _fetched(remote, store, entry, damaged)
            print(f"{entry.name}: {found}", flush=True)
    if damaged:
        raise RemoteError("\n".join(damaged))
    return 0


def _fetched(remote: "Remote", store: "Store", entry: "Entry", damaged: list[str]) -> str:
    """Fetches an artifact whose key's lock is held; returns what happened, in a word or two."""
    from runner.cache.remote import DamagedRemoteError

    try:
        record = remote.record(entry.stage.kind, str(entry.key))
        if record is None:
            return "not there"
        remote.fetch(record, store, known=entry.record)
    except DamagedRemoteError as error:
        damaged.append(str(error))
        return "damaged there"
    return "fetched"
