"""What the words of a command line stand for: the recipe, and the cache. Shared by the files that hold verbs."""

import argparse
import os
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cache.remote import address_fault
from runner.cache.store import Store, default_cache
from runner.completion import stages
from runner.errors import RecipeError
from runner.recipe.recipe import Recipe, load_recipe
from runner.reporting.progress import JsonProgress, PlainProgress, Progress

if TYPE_CHECKING:
    from runner.cache.remote import Remote


def add_recipe_options(sub: argparse.ArgumentParser) -> None:
    """What every verb takes that loads a recipe."""
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override, such as stage.base.seed=1",
    )
    sub.add_argument(
        "--allow-path",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="let the recipe read there, besides its own folder; also STOCKPOT_ALLOW_PATH",
    )


def add_stage_argument(
    sub: argparse.ArgumentParser, *names: str, help: str = "a stage of the recipe", **settings: Any
) -> None:
    """A stage of the recipe: an argument, or the option `names`; the shell proposes what there is."""
    action = sub.add_argument(*(names or ("stage",)), metavar="STAGE", help=help, **settings)
    action.completer = stages  # type: ignore[attr-defined]  # argcomplete reads it there


def add_sampling_options(sub: argparse.ArgumentParser) -> None:
    """How a model that one talks to chooses its words, and how fast."""
    sub.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)")
    sub.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that together reach P")
    sub.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    sub.add_argument("--seed", type=int, default=0, help="of what is left to chance (default: 0)")
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    sub.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU, a token takes 0.6 of the time, after 15 s of compiling at the first start and 5 s at others",
    )


def add_cache_option(sub: argparse.ArgumentParser) -> None:
    """What every verb takes that looks into the cache."""
    sub.add_argument("--cache", type=Path, metavar="DIR", help="instead of STOCKPOT_CACHE or cache/ of the project")


def recipe_of(options: argparse.Namespace, path: Path | None = None, *, absent: Container[str] = ()) -> Recipe:
    """The recipe that the options name, or the one at `path` with the same options."""
    overrides = list(options.overrides)
    if getattr(options, "processes", None):
        overrides.append(f"parallel.processes={options.processes}")
    from_environment = [Path(part) for part in os.environ.get("STOCKPOT_ALLOW_PATH", "").split(os.pathsep) if part]
    return load_recipe(path or options.recipe, overrides, allowed=[*options.allow_path, *from_environment], absent=absent)


def add_remote_option(sub: argparse.ArgumentParser) -> None:
    """What every verb takes that may look elsewhere."""
    sub.add_argument(
        "--remote", metavar="ADDRESS", help="a cache elsewhere, instead of STOCKPOT_REMOTE or the recipe's; '' for none"
    )


def remote_of(options: argparse.Namespace, recipe: Recipe) -> str | None:
    """The address of the remote that the options, the environment or the recipe name."""
    asked = options.remote if options.remote is not None else os.environ.get("STOCKPOT_REMOTE")
    address = asked if asked is not None else recipe.head.cache.remote
    if address and (fault := address_fault(address)):
        raise RecipeError(f"remote: {fault}")
    return address or None


def open_remote_of(options: argparse.Namespace, recipe: Recipe) -> "Remote":
    """The remote that the options, the environment or the recipe name; RecipeError if none does."""
    from runner.cache.remote import open_remote

    address = remote_of(options, recipe)
    if address is None:
        raise RecipeError(f"{recipe.path}: names no [cache] remote; expected one there, in STOCKPOT_REMOTE, or with --remote")
    return open_remote(address)


def store_of(options: argparse.Namespace, recipe: Path | None = None) -> Store:
    """The cache that the options, the environment or the place of the recipe name; without a recipe, that of this folder."""
    return Store(default_cache(recipe or getattr(options, "recipe", None) or Path("recipe.toml"), options.cache))


def stage_named(recipe: Recipe, name: str) -> None:
    """RecipeError if the recipe has no such stage."""
    known = [*dict.fromkeys([*recipe.written, *recipe.stages])]
    if name not in known:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{recipe.path}: found no stage {name!r}; expected one of {', '.join(known)}{hint}")


def make_progress(expected: Callable[[], Mapping[str, float]], *, as_json: bool = False) -> Progress:
    """A live view on a terminal, plain lines elsewhere, JSON on standard output where it is asked for.

    `expected` gives the seconds that stages are thought to take, as far as known; only the live view asks.
    """
    if as_json:
        return JsonProgress(sys.stdout)
    if not sys.stderr.isatty():
        return PlainProgress(sys.stderr)
    from runner.reporting.live import LiveProgress

    return LiveProgress(expected())
