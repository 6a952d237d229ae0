"""The command line: `run RECIPE` and its verbs. Arguments in, exit code out; everything else is done elsewhere."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tomli_w

from runner.errors import RecipeError, StockpotError
from runner.graph import ancestors
from runner.recipe import Recipe, load_recipe
from runner.store import Store, default_cache

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; the console script `run` exits with what this returns."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in (*VERBS, "-h", "--help"):
        words.insert(0, "run")
    options = _parser().parse_args(words)
    try:
        return int(VERBS[options.verb](options))
    except StockpotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted; what is finished or checkpointed is kept, and the same command goes on from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"{error.strerror or error}{place}", file=sys.stderr)
        return 3


def run(options: argparse.Namespace) -> int:
    """Does what is not in the cache."""
    from runner.execute import Execution, StopRequest
    from runner.progress import make_progress

    recipe, store = _recipe(options), _store(options)
    for name in [*options.force, *([options.until] if options.until else [])]:
        _stage_named(recipe, name)
    if options.until:
        for name in options.force:
            if name != options.until and name not in ancestors(recipe.stages, options.until):
                raise RecipeError(f"--force {name}: wants a stage that --until {options.until} runs")
    progress, stop = make_progress(), StopRequest()
    stop.install()
    try:
        Execution(recipe, store, progress, stop).run(until=options.until, force=options.force)
    finally:
        progress.close()
    return 0


def plan(options: argparse.Namespace) -> int:
    """Shows the state of each stage, and why."""
    from runner.plan import Plan, as_json

    recipe = _recipe(options)
    if options.until:
        _stage_named(recipe, options.until)
    made = Plan(recipe, _store(options), until=options.until)
    if options.json:
        print(json.dumps(as_json(recipe, made), indent=2, ensure_ascii=False))
        return 0
    widths = [
        max(len(text) for text in column) for column in zip(*((e.name, e.stage.kind, e.state) for e in made), strict=True)
    ]
    for entry in made:
        name, kind, state = (
            text.ljust(width) for text, width in zip((entry.name, entry.stage.kind, entry.state), widths, strict=True)
        )
        print(f"{name}  {kind}  {state}  {entry.reason}".rstrip())
    return 0


def why(options: argparse.Namespace) -> int:
    """Explains the state of one stage."""
    from runner.plan import Plan

    recipe = _recipe(options)
    _stage_named(recipe, options.stage)
    entry = Plan(recipe, _store(options)).entries[options.stage]
    print(f"{entry.name} ({entry.stage.kind}): {entry.state}")
    for line in entry.reason.split("; ") if entry.reason else ["same fields and inputs as the finished artifact"]:
        print(f"  {line}")
    if entry.key:
        print(f"  key {entry.key}")
    if entry.record:
        print(f"  made {entry.record.data['finished']} in {entry.record.data['seconds']:.0f} s")
    return 0


def show(options: argparse.Namespace) -> int:
    """Prints the recipe with everything it extends, overrides and defaults."""
    print(tomli_w.dumps(_recipe(options).resolved()), end="")
    return 0


def path(options: argparse.Namespace) -> int:
    """Prints the folder of a finished artifact."""
    from runner.plan import Plan

    recipe = _recipe(options)
    _stage_named(recipe, options.stage)
    entry = Plan(recipe, _store(options)).entries[options.stage]
    if entry.path is None:
        print(f"{options.stage}: {entry.state}; there is no finished artifact", file=sys.stderr)
        return 1
    print(entry.path)
    return 0


def schema(options: argparse.Namespace) -> int:
    """Prints the JSON Schema of recipes."""
    from runner.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "plan": plan,
    "why": why,
    "show": show,
    "path": path,
    "schema": schema,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run",
        description="One TOML recipe in, a published language model out. `run RECIPE` is short for `run run RECIPE`.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        if name == "schema":
            continue
        sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
        if name in ("why", "path"):
            sub.add_argument("stage", metavar="STAGE", help="a stage of the recipe")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="override, such as stage.base.seed=1",
        )
        if name == "show":
            continue
        sub.add_argument("--cache", type=Path, metavar="DIR", help="instead of STOCKPOT_CACHE or cache/ of the project")
        if name in ("run", "plan"):
            sub.add_argument("--until", metavar="STAGE", help="only this stage and what it needs")
        if name == "run":
            sub.add_argument("--force", action="append", default=[], metavar="STAGE", help="make its artifact again")
            sub.add_argument("--processes", metavar="N", help="processes of each training, instead of [parallel]")
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="for programs")
    return parser


def _recipe(options: argparse.Namespace) -> Recipe:
    overrides = list(options.overrides)
    if getattr(options, "processes", None):
        overrides.append(f"parallel.processes={options.processes}")
    return load_recipe(options.recipe, overrides)


def _store(options: argparse.Namespace) -> Store:
    return Store(default_cache(options.recipe, options.cache))


def _stage_named(recipe: Recipe, name: str) -> None:
    if name not in recipe.stages:
        from difflib import get_close_matches

        near = get_close_matches(name, recipe.stages, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{recipe.path}: found no stage {name!r}; wants one of {', '.join(recipe.stages)}{hint}")


if __name__ == "__main__":
    sys.exit(main())
