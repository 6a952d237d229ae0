"""`run inspect RECIPE STAGE`: what a stage will learn from."""

import argparse
from pathlib import Path

from runner.errors import RecipeError
from runner.options import add_cache_option, add_recipe_options, add_stage_argument, recipe_of, stage_named, store_of
from runner.plan import Plan


def add_options(sub: argparse.ArgumentParser) -> None:
    """What may follow the verb."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    add_stage_argument(sub)
    sub.add_argument("--count", type=int, default=5, metavar="N", help="samples of each kind (default: 5)")
    add_recipe_options(sub)
    add_cache_option(sub)


def main(options: argparse.Namespace) -> int:
    """Shows rows before and after cleaning, tokens, packed rows, or chats with what is learned of them."""
    from rich.console import Console

    from llm.errors import InputError
    from runner.views.inspection import inspect

    recipe = recipe_of(options)
    stage_named(recipe, options.stage)
    if options.count < 1:
        raise RecipeError(f"--count: wants at least 1, found {options.count}")
    console = Console(highlight=False, soft_wrap=True)
    try:
        for line in inspect(Plan(recipe, store_of(options)), options.stage, count=options.count):
            console.print(line)
    except InputError as error:
        raise RecipeError(f"{options.stage}: {error}") from error
    return 0
