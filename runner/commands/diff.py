"""`run diff A B`: what differs between two recipes, once both are resolved."""

import argparse
import copy
from pathlib import Path

from runner.graph import changes
from runner.options import add_recipe_options, recipe_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("before", type=Path, metavar="A", help="a TOML file")
    sub.add_argument("after", type=Path, metavar="B", help="another, or the same to see what --set changes")
    add_recipe_options(sub)


def main(options: argparse.Namespace) -> int:
    """Shows every field in which two recipes differ, defaults and what they extend included; 1 if there is one."""
    plain = copy.copy(options)
    plain.overrides = []  # --set is for B alone
    before, after = recipe_of(plain, options.before).resolved(), recipe_of(options, options.after).resolved()
    found = changes(before, after)
    for line in found:
        print(line)
    return 1 if found else 0
