"""`run rollback RECIPE`: returns the Hub repository to an earlier release."""

import argparse

from runner.errors import RecipeError
from runner.options import add_recipe_argument, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("--to", metavar="REVISION", help="a tag or a commit (default: the release before the current one)")
    sub.add_argument("--stage", metavar="STAGE", help="the publish stage, if the recipe has several")
    sub.add_argument("--overwrite", action="store_true", help="roll back even if somebody else changed the Hub repository")


def main(options: argparse.Namespace) -> int:
    """Restores an earlier release on the Hub as a new commit; `run publish` restores the newest."""
    from runner.hub.retries import Retries
    from runner.hub.rollback import roll_back
    from runner.stages.publish import Publish

    recipe, store = recipe_of(options), store_of(options)
    found = {
        name: stage.target
        for name, stage in recipe.stages.items()
        if isinstance(stage, Publish) and stage.target and options.stage in (None, name)
    }
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise RecipeError(
            f"{recipe.path}: expected one stage of the kind publish with a repo, got {names}; choose with --stage"
        )
    ((name, target),) = found.items()
    if target.pull_request:
        raise RecipeError(
            f"stage.{name}: expected a stage that pushes to a branch, but it opens pull requests; close or "
            f"revert them on the Hub"
        )
    receipt = roll_back(
        target,
        to=options.to,
        receipts=store.root / "receipts",
        overwrite=options.overwrite,
        retries=Retries(note=lambda sentence: print(sentence, flush=True)),
    )
    print(f"{name}: {target} holds what {str(receipt.restores)[:12]} held: {receipt.url}")
    return 0
