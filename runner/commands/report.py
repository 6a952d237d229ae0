"""`run report RECIPE`: everything that the cache knows about a recipe, on one page."""

import argparse
import datetime
from pathlib import Path

from runner.errors import RecipeError
from runner.options import add_recipe_argument, recipe_of, store_of
from runner.planning.plan import Plan


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("--out", type=Path, metavar="FILE", help="a .html or .md file (default: NAME-report.html)")


def main(options: argparse.Namespace) -> int:
    """Writes a self-contained page: graph, scores and gates, curves, data, answers, cost."""
    from runner.reporting.report import RunReport, as_html, as_markdown

    recipe = recipe_of(options)
    out = options.out or Path(f"{recipe.head.name}-report.html")
    forms = {".html": as_html, ".md": as_markdown}
    if out.suffix not in forms:
        raise RecipeError(f"--out: expected a name that ends in {' or '.join(forms)}, got {str(out)!r}")
    found = RunReport(recipe, Plan(recipe, store_of(options)), now=datetime.datetime.now(datetime.UTC))
    out.write_text(forms[out.suffix](found), encoding="utf-8")
    print(out)
    return 0
