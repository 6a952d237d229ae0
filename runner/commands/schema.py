"""`run schema`: the JSON Schema of recipes, or their reference page."""

import argparse
import json


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("--markdown", action="store_true", help="print the reference page: types, defaults, meanings")


def main(options: argparse.Namespace) -> int:
    """Prints the JSON Schema of recipes."""
    if options.markdown:
        from runner.recipe.reference import recipe_reference

        print(recipe_reference(), end="")
        return 0
    from runner.recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0
