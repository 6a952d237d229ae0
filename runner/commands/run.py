"""`run RECIPE`: runs the stages whose results are not in the cache."""

import argparse
import contextlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cache.running import noted
from runner.cache.store import Store
from runner.errors import GateError, RecipeError
from runner.options import (
    add_cache_option,
    add_check_inputs_option,
    add_engine_option,
    add_recipe_options,
    add_remote_option,
    add_stage_argument,
    make_view,
    recipe_of,
    recipe_path,
    remote_of,
    store_of,
)
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView

if TYPE_CHECKING:
    from runner.engine.interface import Engine
    from runner.planning.plan import Plan

HF = "hf://"
NOT_RUN = 1  # exit code if the user is asked and declines


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument(
        "recipe",
        type=_recipe,
        metavar="RECIPE",
        help="a TOML file, the name of one in recipes/, or hf://OWNER/NAME[@REVISION] of a published model",
    )
    add_recipe_options(sub)
    add_cache_option(sub)
    add_check_inputs_option(sub)
    add_stage_argument(sub, "--until", help="only this stage and what it needs")
    add_stage_argument(sub, "--force", help="run this stage even if its result is cached", action="append", default=[])
    add_remote_option(sub)
    sub.add_argument("--detach", action="store_true", help="run in the background; `run watch` and `run stop` reach it")
    sub.add_argument("--json", action="store_true", help="print one JSON object per event on standard output")
    sub.add_argument("--overwrite", action="store_true", help="push even if somebody else changed the Hub repository")
    published = sub.add_argument_group("published models")
    published.add_argument("--yes", action="store_true", help="run it without asking")
    published.add_argument(
        "--data", action="append", default=[], type=Path, metavar="DIR", help="a folder with its input files, under any names"
    )
    sub.add_argument("--processes", metavar="N", help="processes of each training on a node, instead of [parallel]")
    sub.add_argument("--nodes", metavar="N", help="nodes of each training, instead of [parallel]")
    add_engine_option(sub)


def main(options: argparse.Namespace) -> int:
    """Runs the stages whose results are not in the cache."""
    from runner.engine.choice import engine_of
    from runner.planning.cost import expected_seconds
    from runner.planning.plan import Plan

    store = store_of(options, Path("recipe.toml") if isinstance(options.recipe, str) else options.recipe)
    published = None
    if isinstance(options.recipe, str):
        from runner.published.recipe import Address, download_recipe

        published = download_recipe(Address.parse(options.recipe), store, data=options.data)
        options.recipe = published.recipe
    elif options.yes or options.data:
        raise RecipeError(f"--yes and --data: expected a published model, hf://OWNER/NAME, got {str(options.recipe)!r}")
    recipe = recipe_of(options, absent=store.digests.promised)
    for name in options.force if options.until else ():
        if not recipe.needed(options.until).issuperset(recipe.names_of(name)):
            raise RecipeError(f"--force: expected a stage that --until {options.until} runs, got {name!r}")
    engine, remote = engine_of(options.engine, nodes=recipe.head.parallel.nodes), remote_of(options, recipe)
    if published is not None:
        from runner.published import confirm

        plan = Plan(recipe, store, until=options.until)
        confirm.show(published, plan)
        if remote is None:
            confirm.refuse_if_stuck(published, plan)
        if not confirm.agreed(published, yes=options.yes):
            return NOT_RUN
    if options.detach:
        return _detached(options, recipe, store, until=options.until)
    view = make_view(lambda: expected_seconds(recipe, store), as_json=options.json)
    try:
        with contextlib.closing(view), noted(store.root, recipe.path):
            last = _execute(options, recipe, store, view, engine=engine, remote=remote)
    except GateError:
        if not options.json:
            from runner.planning.outcomes import cures

            plan = Plan(recipe, store, until=options.until)
            _print_scores(plan)
            print("", *cures(plan), sep="\n", file=sys.stderr)
        raise
    if not options.json:
        _print_ending(options, last)
    if published is not None:
        from runner.published.lockfile import results

        print(results(published.lock, Plan(recipe, store, until=options.until)), file=sys.stderr)
    return 0


def _detached(options: argparse.Namespace, recipe: Recipe, store: Store, *, until: str | None) -> int:
    """Starts the same command in the background, after a look at the data, whose faults are told here."""
    from runner.cache.run_log import FOLDER
    from runner.planning.data_look import check_data
    from runner.planning.plan import Plan
    from runner.safe_path import PYTHON

    check_data(Plan(recipe, store, until=until), lambda sentence: print(sentence, file=sys.stderr))
    log = store.root / FOLDER / f"{recipe.head.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [word for word in options.words if word != "--detach"]
    command = [*PYTHON, "-m", "runner.cli", *words]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(f"runs in the background as process {process.pid}; what it says goes to {log}", file=sys.stderr)
    for verb in ("watch", "stop"):
        print(f"  {shlex.join(['run', verb, str(options.recipe), *_cache_words(options)])}", file=sys.stderr)
    return 0


def _cache_words(options: argparse.Namespace) -> list[str]:
    return ["--cache", str(options.cache)] if options.cache else []


def _execute(
    options: argparse.Namespace, recipe: Recipe, store: Store, view: RunView, *, engine: "Engine", remote: str | None
) -> "Plan":
    """Runs the recipe; returns the last plan."""
    from runner.execution.scheduler import Scheduler
    from runner.execution.stop import StopRequest

    stop = StopRequest()
    stop.install()
    scheduler = Scheduler(recipe, store, view, stop, remote=remote, overwrite=options.overwrite, engine=engine)
    return scheduler.run(until=options.until, force=options.force)


def _print_scores(plan: "Plan") -> None:
    from runner.planning.outcomes import score_table
    from runner.planning.text_table import text_table

    rows = score_table(entry for entry in plan if plan.is_in_use(entry.name))
    if rows:
        print("", *text_table(rows), sep="\n", file=sys.stderr)


def _print_ending(options: argparse.Namespace, plan: "Plan") -> None:
    """Prints the scores, the folder of the model, and the commands that use it."""
    from runner.serving.models import finished_checkpoints
    from runner.serving.predictions import task_of
    from runner.stages.fields.eval_tasks.questions import ClassificationTask

    _print_scores(plan)
    if not (checkpoints := finished_checkpoints(plan)):
        return
    words = [str(options.recipe), *(word for override in options.overrides for word in ("--set", override))]
    words += _cache_words(options)
    print(f"\n{checkpoints[-1].name}: the model is in {checkpoints[-1].path}", file=sys.stderr)
    if isinstance(task_of(plan.recipe, None), ClassificationTask):
        recipe, *others = words
        print(f"  {shlex.join(['run', 'predict', recipe, 'new.csv', '--out', 'labelled.csv', *others])}", file=sys.stderr)
    for command in ("chat", "report", "serve"):
        print(f"  {shlex.join(['run', command, *words])}", file=sys.stderr)


def _recipe(text: str) -> Path | str:
    """The path of a recipe, or the address of a published model as text, since Path would merge its slashes."""
    return text if text.startswith(HF) else recipe_path(text)
