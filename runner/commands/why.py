"""`run why RECIPE STAGE`: the state of one stage and the reason."""

import argparse

from runner.options import add_recipe_argument, add_stage_argument, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub)


def main(options: argparse.Namespace) -> int:
    """Explains the state of one stage in full."""
    from runner.diagnostics.resume_check import proof_of, sentence
    from runner.planning.plan import Plan

    recipe, store = recipe_of(options), store_of(options)
    entry = Plan(recipe, store).named(options.stage)
    print(f"{entry.name} ({entry.stage.kind}): {entry.state}")
    for line in entry.reason.split("; ") if entry.reason else ["same fields and inputs as the finished artifact"]:
        print(f"  {line}")
    if entry.key:
        print(f"  key {entry.key}")
    if entry.record:
        print(f"  made {entry.record.data['finished']} in {entry.record.data['seconds']:.0f} s")
    if entry.key and (proof := proof_of(store, entry.key)):
        print(f"  proved {proof['time']}: {sentence(proof)}")
    return 0
