"""`run show RECIPE`: the resolved recipe."""

import argparse
from pathlib import Path

import tomli_w

from runner.options import add_recipe_options, recipe_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    add_recipe_options(sub)


def main(options: argparse.Namespace) -> int:
    """Prints the resolved recipe: with what it extends, overrides and defaults."""
    print(tomli_w.dumps(recipe_of(options).resolved()), end="")
    return 0
