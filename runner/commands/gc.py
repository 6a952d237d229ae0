"""`run gc [RECIPE]...`: frees space in the cache."""

import argparse
import re
from pathlib import Path

from runner import compiled_code
from runner.errors import RecipeError
from runner.options import add_cache_option, add_recipe_options, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("recipes", type=Path, nargs="*", metavar="RECIPE", help="a recipe whose results are kept")
    sub.add_argument(
        "--keep-size",
        type=size_in_bytes,
        metavar="SIZE",
        help="remove the least recently used results until at most SIZE is left, such as 20GB",
    )
    sub.add_argument("--only", action="store_true", help="keep only the results of RECIPEs, not those of recent runs")
    sub.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    add_recipe_options(sub)
    add_cache_option(sub)


def main(options: argparse.Namespace) -> int:
    """Removes results that no recipe or recent run uses, or the least recently used ones. Records stay."""
    from runner.cache.garbage_collection import collect
    from runner.cache.run_log import logged_runs
    from runner.planning.plan import Plan

    store = store_of(options, options.recipes[0] if options.recipes else None)
    plans = [Plan(recipe_of(options, path), store) for path in options.recipes]
    named = {f"{entry.stage.kind}-{entry.key}" for plan in plans for entry in plan if entry.key}
    if not named and options.keep_size is None and any((store.root / "stages").glob("*")):
        if options.only:
            raise RecipeError("--only: expected RECIPEs whose results to keep, got none")
        if not logged_runs(store.root):
            raise RecipeError(
                f"{store.root}: expected RECIPEs whose results to keep, or --keep-size, since no run is on record"
            )
    outcome = collect(store, named=named, forget_runs=options.only, keep_size=options.keep_size, dry_run=options.dry_run)
    for item, size in outcome.removed:
        done = "would remove" if options.dry_run else "removed"
        print(f"{done}  {readable(size):>8}  {item.path.relative_to(store.root)}  ({item.reason})")
    for item in outcome.in_use:
        print(f"kept, in use:  {item.path.relative_to(store.root)}")
    code, code_left = compiled_code.collect(dry_run=options.dry_run)
    if code:
        done = "would remove" if options.dry_run else "removed"
        print(f"{done} {readable(code)} of compiled code; {readable(code_left)} left in {compiled_code.compiled_folder()}")
    done = "would free" if options.dry_run else "freed"
    print(f"{done} {readable(outcome.freed)}; {readable(outcome.left)} left in {store.root}")
    if options.keep_size is not None and outcome.left > options.keep_size:
        print(f"more than {readable(options.keep_size)} left: the rest is in use, or used by a RECIPE")
    return 0


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
        raise argparse.ArgumentTypeError(f"expected a size such as 20GB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
