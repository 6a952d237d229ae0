"""`run path RECIPE STAGE`: the folder of an artifact."""

import argparse
import sys

from runner.options import add_recipe_argument, add_remote_option, add_stage_argument, plan_of, recipe_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub)
    add_remote_option(sub)


def main(options: argparse.Namespace) -> int:
    """Prints the folder of a finished artifact, fetched from the remote if it is not here; exits with 1 if there is none."""
    recipe = recipe_of(options)
    plan = plan_of(options, recipe, needed=lambda plan: [plan.named(options.stage)])
    entry = plan.named(options.stage)
    if options.stage != entry.name and not plan.is_in_use(entry.name):
        is_sweep = plan.family_of(entry.name) is recipe.sweep
        why = "the best setting is not known yet" if is_sweep else "no attempt has passed its gates"
        print(f"{options.stage}: {why}; {entry.name} is {entry.state}", file=sys.stderr)
        return 1
    if entry.path is None:
        pull = "; `run pull` fetches it from a remote that has it" if entry.record else ""
        print(f"{options.stage}: {entry.state}; there is no finished artifact{pull}", file=sys.stderr)
        return 1
    print(entry.path)
    return 0
