"""`run graph RECIPE`: a drawing of the graph of stages."""

import argparse

from runner.options import add_recipe_argument, recipe_of, store_of
from runner.planning.plan import Plan
from runner.reporting.graph_drawing import FORMS


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("--form", choices=FORMS, default="text", help="form of the drawing (default: text)")


def main(options: argparse.Namespace) -> int:
    """Draws the graph with the state of each stage, as text, Mermaid or SVG."""
    print(FORMS[options.form](Plan(recipe_of(options), store_of(options))), end="")
    return 0
