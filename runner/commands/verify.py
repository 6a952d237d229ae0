"""`run verify [RECIPE]`: checks every artifact of a cache against its digests."""

import argparse

from runner.errors import IntegrityError, RecipeError
from runner.options import add_cache_arguments, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_cache_arguments(sub)


def main(options: argparse.Namespace) -> int:
    """Checks every artifact of a cache against its digests, and sets damaged ones aside."""
    from runner.cache.verify import verify as verify_store

    if options.recipe is not None and not options.recipe.is_file():
        raise RecipeError(f"{options.recipe}: expected a recipe, but there is no such file")
    store = store_of(options)
    findings = verify_store(store)
    for origin, count in sorted(findings.origins.items(), key=str):
        used = "" if store.origins.counts(origin) else ", which are not used, since you did not name it: see --remote"
        print(f"{count} records {'made here' if origin is None else f'from {origin}{used}'}")
    counted = f"{store.root}: {findings.artifacts} artifacts and {findings.records} records"
    if findings.faults:
        raise IntegrityError("\n".join([*findings.faults, f"{counted}; {len(findings.faults)} files are damaged"]))
    print(f"{counted}, all as recorded")
    return 0
