"""`run schema`: the JSON Schema of recipes."""

import argparse
import json


def add_options(sub: argparse.ArgumentParser) -> None:
    """Nothing follows the verb."""


def main(options: argparse.Namespace) -> int:
    """Prints the JSON Schema of recipes."""
    from runner.reading.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0
