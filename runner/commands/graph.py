"""`run graph RECIPE`: a drawing of the graph of stages."""

import argparse
from pathlib import Path

from runner.options import add_cache_option, add_recipe_options, recipe_of, store_of
from runner.planning.plan import Plan
from runner.reporting.graph_drawing import draw


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    sub.add_argument("--form", choices=("text", "mermaid", "svg"), default="text", help="form of the drawing (default: text)")
    add_recipe_options(sub)
    add_cache_option(sub)


def main(options: argparse.Namespace) -> int:
    """Draws the graph with the state of each stage, as text, Mermaid or SVG."""
    print(draw(Plan(recipe_of(options), store_of(options)), options.form), end="")
    return 0
