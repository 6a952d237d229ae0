"""The verbs about the cache itself: verify, gc, push, pull. Each prints what it did and returns an exit code."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import DamageError, RecipeError
from runner.options import add_cache_option, add_recipe_options, add_remote_option, recipe_of, remote_of, stage_named, store_of
from runner.recipe import Recipe

if TYPE_CHECKING:
    from runner.remote import Remote


def verify(options: argparse.Namespace) -> int:
    """Checks every artifact of a cache against its digests; sets aside what is damaged."""
    from runner.verify import verify as verify_store

    if options.recipe is not None and not options.recipe.is_file():
        raise RecipeError(f"{options.recipe}: no such recipe")
    store = store_of(options)
    findings = verify_store(store)
    counted = f"{store.root}: {findings.artifacts} artifacts and {findings.records} records"
    if findings.faults:
        raise DamageError("\n".join([*findings.faults, f"{counted}; found {len(findings.faults)} files damaged"]))
    print(f"{counted}, all as recorded")
    return 0


def gc(options: argparse.Namespace) -> int:
    """Removes what no recipe or recent run reaches, or what was used longest ago; records stay."""
    from runner.collect import collect
    from runner.plan import Plan
    from runner.runs import noted_runs

    store = store_of(options, options.recipes[0] if options.recipes else None)
    plans = [Plan(recipe_of(options, path), store) for path in options.recipes]
    named = {f"{entry.stage.kind}-{entry.key}" for plan in plans for entry in plan if entry.key}
    if not named and options.keep_size is None and any((store.root / "stages").glob("*")):
        if options.only:
            raise RecipeError("--only: wants RECIPEs whose results are kept, found none")
        if not noted_runs(store.root):
            raise RecipeError(f"{store.root}: no run is noted there; wants RECIPEs whose results are kept, or --keep-size")
    outcome = collect(store, named=named, forget_runs=options.only, keep_size=options.keep_size, dry_run=options.dry_run)
    for item, size in outcome.removed:
        done = "would remove" if options.dry_run else "removed"
        print(f"{done}  {readable(size):>8}  {item.path.relative_to(store.root)}  ({item.reason})")
    for item in outcome.in_use:
        print(f"stays, in use:  {item.path.relative_to(store.root)}")
    done = "would free" if options.dry_run else "freed"
    print(f"{done} {readable(outcome.freed)}; {readable(outcome.left)} stay in {store.root}")
    if options.keep_size is not None and outcome.left > options.keep_size:
        print(f"more than {readable(options.keep_size)} stay, since what is left is in use or reached by a recipe given")
    return 0


def push(options: argparse.Namespace) -> int:
    """Uploads the finished artifacts of a recipe to a cache elsewhere, those that it lacks."""
    from runner.plan import Plan
    from runner.store import Waiting

    recipe = recipe_of(options)
    if options.until:
        stage_named(recipe, options.until)
    store, remote = store_of(options), _remote(options, recipe)
    for entry in Plan(recipe, store, until=options.until):
        if entry.record is None or entry.path is None:
            print(f"{entry.name}: {entry.state}, not uploaded")
            continue
        with store.reading([entry.record], waiting=Waiting()):
            if not store.has_artifact(entry.record, reread=True):
                raise DamageError(f"{entry.name}: its artifact does not match its record; `run verify` tells more")
            uploaded = remote.offer(entry.record, entry.path)
        print(f"{entry.name}: {'uploaded' if uploaded else 'is there already'}", flush=True)
    return 0


def pull(options: argparse.Namespace) -> int:
    """Fetches the artifacts of a recipe from a cache elsewhere, those that are not here."""
    from runner.plan import Plan
    from runner.store import Waiting

    recipe = recipe_of(options)
    if options.until:
        stage_named(recipe, options.until)
    store, remote = store_of(options), _remote(options, recipe)
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
            print(f"{entry.name}: {'fetched' if record else 'is not there'}", flush=True)
    return 0


def _remote(options: argparse.Namespace, recipe: Recipe) -> "Remote":
    from runner.remote import open_remote

    address = remote_of(options, recipe)
    if address is None:
        raise RecipeError(f"{recipe.path}: names no [cache] remote; wants one there, in STOCKPOT_REMOTE, or with --remote")
    return open_remote(address)


def readable(size: int) -> str:
    """Bytes as 999 B, 1.2 kB, 3.4 GB."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def size_in_bytes(text: str) -> int:
    """20GB, 1.5 TB, 500MiB or a plain number as bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"wants a size such as 20GB, found {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


VERBS: Mapping[str, Callable[[argparse.Namespace], int]] = {"verify": verify, "gc": gc, "push": push, "pull": pull}


def add_options(name: str, sub: argparse.ArgumentParser) -> None:
    """The arguments of one of these verbs."""
    if name == "verify":
        sub.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="whose cache; else that of this folder")
    if name == "gc":
        sub.add_argument("recipes", type=Path, nargs="*", metavar="RECIPE", help="whose results are kept in any case")
        sub.add_argument(
            "--keep-size",
            type=size_in_bytes,
            metavar="SIZE",
            help="remove by time of last use until this much is left: 20GB",
        )
        sub.add_argument("--only", action="store_true", help="do not keep what recent runs reached, only what RECIPEs reach")
        sub.add_argument("--dry-run", action="store_true", help="say what would go and how much, and remove nothing")
        add_recipe_options(sub)
    if name in ("push", "pull"):
        sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
        sub.add_argument("--until", metavar="STAGE", help="only this stage and what it needs")
        add_recipe_options(sub)
        add_remote_option(sub)
    add_cache_option(sub)
