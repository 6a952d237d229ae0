"""`run report RECIPE`: everything that the cache knows about a recipe, on one page."""

import argparse
import datetime
from pathlib import Path

from runner.artifacts import Scores
from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_remote_option, plan_of, recipe_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_remote_option(sub)
    sub.add_argument("--out", type=Path, metavar="FILE", help="a .html or .md file (default: NAME-report.html)")


def main(options: argparse.Namespace) -> int:
    """Writes a self-contained page: graph, scores and gates, curves, data, answers, cost."""
    from runner.reporting.report import RunReport, as_html, as_markdown

    recipe = recipe_of(options)
    out = options.out or Path(f"{recipe.head.name}-report.html")
    forms = {".html": as_html, ".md": as_markdown}
    if out.suffix not in forms:
        raise RecipeError(f"--out: expected a name that ends in {' or '.join(forms)}, got {str(out)!r}")
    # Of what is not here, the report needs the answers and errors of evaluations; records have the rest.
    plan = plan_of(options, recipe, needed=lambda plan: [entry for entry in plan if issubclass(entry.stage.makes, Scores)])
    found = RunReport(recipe, plan, now=datetime.datetime.now(datetime.UTC))
    out.write_text(forms[out.suffix](found), encoding="utf-8")
    print(out)
    return 0
