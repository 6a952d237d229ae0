"""`run publish RECIPE`: pushes finished releases to the Hub, without running a stage."""

import argparse

from runner.errors import GateError, IntegrityError, RecipeError, StageError
from runner.options import add_recipe_argument, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("--overwrite", action="store_true", help="push even if somebody else changed the Hub repository")


def main(options: argparse.Namespace) -> int:
    """Pushes finished releases to the Hub, including rolled-back ones; runs no stage."""
    from runner.cache.store import Waiting
    from runner.hub.receipts import Journal
    from runner.planning.plan import Plan
    from runner.stage import EffectContext
    from runner.stages.publish import Publish

    recipe, store = recipe_of(options), store_of(options)
    entries = [(entry, entry.stage) for entry in Plan(recipe, store) if isinstance(entry.stage, Publish) and entry.stage.repo]
    if not entries:
        raise RecipeError(f"{recipe.path}: expected a stage of the kind publish with a repo, got none")
    for entry, _ in entries:
        if entry.state == "skipped":
            raise GateError(f"{entry.name}: {entry.reason}, so it is not published")
        if entry.record is None or entry.path is None:
            reason = f" ({entry.reason})" if entry.reason else ""
            raise StageError(
                f"{entry.name}: expected a finished release, got the state {entry.state}{reason}; run the recipe first"
            )
    receipts = store.root / "receipts"
    acting = EffectContext(overwrite=options.overwrite, note=lambda sentence: print(sentence, flush=True))
    for entry, stage in entries:
        assert entry.record is not None and entry.path is not None and stage.target is not None
        last = Journal.read(receipts, stage.target).last
        if last is not None and last.digest == entry.record.digest and stage.tag in (None, last.tag):
            print(f"{entry.name}: already there: {last.url}")
            continue
        with store.reading([entry.record], waiting=Waiting()):
            if not store.has_artifact(entry.record, reread=True):
                raise IntegrityError(f"{entry.name}: its artifact does not match its record; `run verify` shows the details")
            print(f"{entry.name}: {stage.push(entry.path, entry.record.digest, receipts, acting)}", flush=True)
    return 0
