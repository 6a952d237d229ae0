"""The command line: `run RECIPE` and its verbs. Arguments in, exit code out; everything else is done elsewhere."""

import argparse
import codecs
import io
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tomli_w

from runner import cache_verbs
from runner.errors import RecipeError, StockpotError
from runner.files import DISK_FULL
from runner.graph import ancestors
from runner.options import (
    add_cache_option,
    add_recipe_options,
    add_remote_option,
    recipe_of,
    remote_of,
    stage_named,
    store_of,
)
from runner.secrets import redact

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; the console script `run` exits with what this returns."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in (*VERBS, "-h", "--help"):
        words.insert(0, "run")
    options = _parser().parse_args(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PRINTABLE)
    try:
        return int(VERBS[options.verb](options))
    except StockpotError as error:
        print(redact(str(error)), file=sys.stderr)
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
        hint = "; free some space and run again, what is finished is kept" if error.errno in DISK_FULL else ""
        print(f"{error.strerror or error}{place}{hint}", file=sys.stderr)
        return 3


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """For what the terminal cannot show: the bytes of a file name that is no text as they are, anything else as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


PRINTABLE = "stockpot.printable"
codecs.register_error(PRINTABLE, _printable)


def run(options: argparse.Namespace) -> int:
    """Does what is not in the cache."""
    from runner.execute import Execution
    from runner.progress import make_progress
    from runner.stage_run import StopRequest

    recipe, store = recipe_of(options), store_of(options)
    for name in [*options.force, *([options.until] if options.until else [])]:
        stage_named(recipe, name)
    if options.until:
        for name in options.force:
            if name != options.until and name not in ancestors(recipe.stages, options.until):
                raise RecipeError(f"--force {name}: wants a stage that --until {options.until} runs")
    remote = remote_of(options, recipe)
    progress, stop = make_progress(), StopRequest()
    stop.install()
    try:
        Execution(recipe, store, progress, stop, remote=remote).run(until=options.until, force=options.force)
    finally:
        progress.close()
    return 0


def plan(options: argparse.Namespace) -> int:
    """Shows the state of each stage, and why."""
    from runner.plan import Plan, as_json

    recipe = recipe_of(options)
    if options.until:
        stage_named(recipe, options.until)
    made = Plan(recipe, store_of(options), until=options.until)
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

    recipe = recipe_of(options)
    stage_named(recipe, options.stage)
    entry = Plan(recipe, store_of(options)).entries[options.stage]
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
    print(tomli_w.dumps(recipe_of(options).resolved()), end="")
    return 0


def path(options: argparse.Namespace) -> int:
    """Prints the folder of a finished artifact."""
    from runner.plan import Plan

    recipe = recipe_of(options)
    stage_named(recipe, options.stage)
    entry = Plan(recipe, store_of(options)).entries[options.stage]
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


def bench(options: argparse.Namespace) -> int:
    """Measures speed and memory on this machine, ours beside stock Transformers'."""
    from runner.bench import chosen, measure, recipe_job, reference_job, show

    settings = {"seconds": options.seconds, "compiled": not options.no_compile, "only": chosen(options.only)}
    if options.recipe is not None:
        job = recipe_job(recipe_of(options), store_of(options), **settings)
    elif options.overrides:
        raise RecipeError("--set: wants a RECIPE to change, found none")
    else:
        job = reference_job(**settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the worker ends and its folder goes then, too
    result = measure(job)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show(result)
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "plan": plan,
    "why": why,
    "show": show,
    "path": path,
    "schema": schema,
    "bench": bench,
    **cache_verbs.VERBS,
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
        if name in cache_verbs.VERBS:
            cache_verbs.add_options(name, sub)
            continue
        if name == "bench":
            _bench_options(sub)
        else:
            sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
        if name in ("why", "path"):
            sub.add_argument("stage", metavar="STAGE", help="a stage of the recipe")
        add_recipe_options(sub)
        if name == "show":
            continue
        add_cache_option(sub)
        if name in ("run", "plan"):
            sub.add_argument("--until", metavar="STAGE", help="only this stage and what it needs")
        if name == "run":
            sub.add_argument("--force", action="append", default=[], metavar="STAGE", help="make its artifact again")
            add_remote_option(sub)
            sub.add_argument("--processes", metavar="N", help="processes of each training, instead of [parallel]")
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="for programs")
    return parser


def _bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="whose first pretrain stage to measure; else a 28.8M model"
    )
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10), at least three rounds")
    sub.add_argument(
        "--only",
        metavar="WHAT",
        help="some of matmul,train,decode,memory,machinery; or learning, which trains twice for --seconds",
    )
    sub.add_argument("--no-compile", action="store_true", help="compile nothing, neither ours nor Transformers")


if __name__ == "__main__":
    sys.exit(main())
