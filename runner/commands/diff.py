"""`run diff A B`: the differences between two resolved recipes."""

import argparse
import copy
from pathlib import Path

from runner.graph import changes
from runner.options import add_recipe_options, recipe_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("before", type=Path, metavar="A", help="a TOML file")
    sub.add_argument("after", type=Path, metavar="B", help="another one, or the same one to see what --set changes")
    add_recipe_options(sub)


def main(options: argparse.Namespace) -> int:
    """Shows every field that differs between two resolved recipes; exits with 1 if there is one."""
    plain = copy.copy(options)
    plain.overrides = []  # --set applies to B only
    before, after = recipe_of(plain, options.before).resolved(), recipe_of(options, options.after).resolved()
    found = changes(before, after)
    for line in found:
        print(line)
    return 1 if found else 0
