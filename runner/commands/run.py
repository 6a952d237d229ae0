"""`run RECIPE`: does what is not in the cache."""

import argparse
import sys
from pathlib import Path

from runner.errors import RecipeError
from runner.options import (
    add_cache_option,
    add_recipe_options,
    add_remote_option,
    add_stage_argument,
    recipe_of,
    remote_of,
    stage_named,
    store_of,
)

HF = "hf://"
NOT_RUN = 1  # exit code of a run that the user was asked about and did not want


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument(
        "recipe", type=_recipe, metavar="RECIPE", help="a TOML file, or hf://OWNER/NAME[@REVISION] of a published model"
    )
    add_recipe_options(sub)
    add_cache_option(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    add_stage_argument(sub, "--force", help="make its artifact again", action="append", default=[])
    add_remote_option(sub)
    sub.add_argument("--json", action="store_true", help="for programs: one JSON object per event, on standard output")
    sub.add_argument("--overwrite", action="store_true", help="push also over what somebody else changed on the Hub")
    of_published = sub.add_argument_group("of a published model")
    of_published.add_argument("--yes", action="store_true", help="run it without asking")
    of_published.add_argument(
        "--data", action="append", default=[], type=Path, metavar="DIR", help="where its input files may be, under any name"
    )
    sub.add_argument("--processes", metavar="N", help="processes of each training on a machine, instead of [parallel]")
    sub.add_argument("--machines", type=int, metavar="N", help="machines that train together, each with such a run")
    sub.add_argument("--machine-rank", type=int, metavar="K", help="which of them this is, from 0")
    sub.add_argument("--main-address", metavar="HOST[:PORT]", help="where the machine of rank 0 is")


def main(options: argparse.Namespace) -> int:
    """Does what is not in the cache."""
    from runner.execution.node_layout import LayoutOptions, layout_of
    from runner.execution.scheduler import Scheduler
    from runner.execution.stop import StopRequest
    from runner.multi_node.coordinator import Coordinator, opened
    from runner.multi_node.participant import Participant
    from runner.options import make_view
    from runner.planning.cost import expected_seconds
    from runner.planning.plan import Plan
    from runner.recipe.first_rows import check_first_rows

    store = store_of(options, Path("recipe.toml") if isinstance(options.recipe, str) else options.recipe)
    published = None
    if isinstance(options.recipe, str):
        from runner.published.recipe import Address, bring

        published = bring(Address.parse(options.recipe), store, data=options.data)
        options.recipe = published.recipe
    elif options.yes or options.data:
        raise RecipeError("--yes and --data: expected a published model, hf://OWNER/NAME")
    recipe = recipe_of(options, absent=store.digests.promised)
    for name in [*options.force, *([options.until] if options.until else [])]:
        stage_named(recipe, name)
    if options.until:
        for name in options.force:
            if not recipe.needed(options.until).issuperset(recipe.names_of(name)):
                raise RecipeError(f"--force {name}: expected a stage that --until {options.until} runs")
    asked = LayoutOptions(options.machines, options.machine_rank, options.main_address)
    layout, remote = layout_of(recipe.head.parallel, asked), remote_of(options, recipe)
    if published is not None:
        from runner.published import confirm

        plan = Plan(recipe, store, until=options.until)
        confirm.show(published, plan)
        if remote is None:
            confirm.refuse_if_stuck(published, plan)
        if not confirm.agreed(published, yes=options.yes):
            return NOT_RUN
    check_first_rows(recipe)
    progress = make_view(lambda: expected_seconds(recipe, store), as_json=options.json)
    stop = StopRequest()
    stop.install()
    try:
        if layout.machines == 1:
            Scheduler(recipe, store, progress, stop, remote=remote, overwrite=options.overwrite).run(
                until=options.until, force=options.force
            )
        elif layout.is_main:
            source = remote if recipe.head.cache.upload else None
            rejoin = 60 * recipe.head.parallel.rejoin_minutes
            with opened(
                Coordinator(layout, store.root, remote=source, note=progress.note, stop=stop, rejoin_seconds=rejoin)
            ) as coordinator:
                run = Scheduler(recipe, store, progress, stop, remote=remote, overwrite=options.overwrite, peers=coordinator)
                run.run(until=options.until, force=options.force)
        else:
            joining = Participant(recipe, store, progress, stop, remote=remote, layout=layout)
            joining.run(until=options.until, force=bool(options.force))
    finally:
        progress.close()
    if published is not None:
        from runner.published.lockfile import results

        print(results(published.lock, Plan(recipe, store, until=options.until)), file=sys.stderr)
    return 0


def _recipe(text: str) -> Path | str:
    """The path of a recipe; the address of a published model stays text, for a path knows no double slash."""
    return text if text.startswith(HF) else Path(text)
