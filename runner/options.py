"""Options that several commands share, and what they stand for: the recipe, the cache, the remote, the view."""

import argparse
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cache.origins import trust, trusted_remotes
from runner.cache.ownership import cache_of
from runner.cache.remote import address_fault, full_address
from runner.cache.store import Store
from runner.completion import stages
from runner.errors import RecipeError
from runner.recipe.recipe import Recipe, load_recipe
from runner.recipe.validation import listed, nearest
from runner.reporting.progress import JsonView, PlainView, RunView

if TYPE_CHECKING:
    from runner.cache.remote import Remote
    from runner.planning.plan import Entry, Plan


SHIPPED = Path(__file__).parents[1] / "recipes"


def add_recipe_argument(sub: argparse.ArgumentParser) -> None:
    """The recipe, with the options of every command that reads one and its cache."""
    sub.add_argument("recipe", type=recipe_path, metavar="RECIPE", help="a TOML file, or the name of one in recipes/")
    add_recipe_options(sub)
    add_cache_option(sub)


def add_recipe_options(sub: argparse.ArgumentParser) -> None:
    """The options of every command that loads a recipe."""
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override, such as stage.base.seed=1"
    )
    sub.add_argument(
        "--allow-path",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder besides its own that the recipe may read; also STOCKPOT_ALLOW_PATH",
    )


def add_stage_argument(
    sub: argparse.ArgumentParser, *names: str, help: str = "a stage of the recipe", **settings: Any
) -> None:
    """A stage of the recipe as an argument, or as the option `names`; shells complete it."""
    action = sub.add_argument(*(names or ("stage",)), metavar="STAGE", help=help, **settings)
    action.completer = stages  # type: ignore[attr-defined]  # argcomplete reads it there


def add_sampling_options(sub: argparse.ArgumentParser) -> None:
    """How a model chooses its tokens in chat and serve."""
    sub.add_argument("--temperature", type=float, default=0.7, help="0 always takes the most likely token (default: 0.7)")
    sub.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens that together reach probability P"
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    sub.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether answers begin with reasoning, for models whose chat template reads enable_thinking (default: its own)",
    )
    sub.add_argument("--seed", type=int, help="of the sampling (default: another for each answer)")
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length limit of an answer (default: 256)")
    sub.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU decode by a kernel, which takes about half of the time; it is compiled once, in some seconds",
    )


def add_cache_option(sub: argparse.ArgumentParser) -> None:
    """The option of every command that uses the cache."""
    sub.add_argument("--cache", type=Path, metavar="DIR", help="instead of STOCKPOT_CACHE or cache/ of the project")


def add_engine_option(sub: argparse.ArgumentParser) -> None:
    """The option of commands that start processes on an engine."""
    sub.add_argument(
        "--engine", metavar="NAME", help="local or slurm: where processes run (STOCKPOT_ENGINE; your file engine.toml)"
    )


def add_check_inputs_option(sub: argparse.ArgumentParser) -> None:
    """The option of commands that compare files with what is known of them."""
    sub.add_argument(
        "--check-inputs",
        action="store_true",
        help="hash every input file and artifact again, also those whose size and times are unchanged",
    )


def add_cache_arguments(sub: argparse.ArgumentParser) -> None:
    """The cache of a recipe or of the current folder, for commands that read no recipe."""
    help = "the recipe whose cache to use (default: the cache of the current folder)"
    sub.add_argument("recipe", type=recipe_path, nargs="?", metavar="RECIPE", help=help)
    add_cache_option(sub)


def recipe_path(text: str) -> Path:
    """The recipe that a command line names: a path (~ is the home folder), or the name of a recipe in this folder, in its
    recipes/ or of those that come with Stockpot. A name that is nowhere is taken as a path.
    """
    path = Path(text).expanduser()
    if path.name != text or path.suffix or path.exists():
        return path
    return recipe_names().get(text, path)


def recipe_names() -> dict[str, Path]:
    """The recipes that need no path, by name."""
    folders = (SHIPPED, Path("recipes"), Path())  # the last one counts
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml")) if path.name != "pyproject.toml"}


def recipe_of(options: argparse.Namespace, path: Path | None = None, *, absent: Container[str] = ()) -> Recipe:
    """The recipe that the options name, or the one at `path` with the same overrides; RecipeError for an unknown stage."""
    overrides = list(options.overrides)
    for name in ("processes", "nodes"):
        if getattr(options, name, None):
            overrides.append(f"parallel.{name}={getattr(options, name)}")
    from_environment = [Path(part) for part in os.environ.get("STOCKPOT_ALLOW_PATH", "").split(os.pathsep) if part]
    allowed = [*options.allow_path, *from_environment]
    path = path or options.recipe
    if path.name == str(path) and not path.suffix and not path.exists():
        names = list(recipe_names())
        raise RecipeError(f"{path}: no such recipe; expected a path, or one of {listed(names)}{nearest(path.name, names)}")
    recipe = load_recipe(path, overrides, allowed=allowed, absent=absent)
    known = list(dict.fromkeys([*recipe.written, *recipe.stages]))
    named = [getattr(options, "stage", None), getattr(options, "until", None)]
    for name in filter(None, [*getattr(options, "force", ()), *named, *getattr(options, "stages", ())]):
        if name not in known:
            raise RecipeError(f"{recipe.path}: no stage {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")
    return recipe


def add_remote_option(sub: argparse.ArgumentParser) -> None:
    """The options of every command that may use a remote cache."""
    sub.add_argument(
        "--remote",
        metavar="ADDRESS",
        help="a remote cache instead of STOCKPOT_REMOTE or the recipe's; its results count from now on. '' for none",
    )
    sub.add_argument(
        "--trust-remote", action="store_true", help="use the remote that the recipe names, without asking, now and later"
    )


def remote_of(options: argparse.Namespace, recipe: Recipe) -> str | None:
    """The address of the remote that the options or the environment name, or of the recipe's if the user agreed to it."""
    asked = options.remote if options.remote is not None else os.environ.get("STOCKPOT_REMOTE")
    address = asked if asked is not None else recipe.head.cache.remote
    if not address:
        return None
    if fault := address_fault(address):
        raise RecipeError(f"remote: {fault}")
    if asked is None and not options.trust_remote and not _agreed(recipe, address):
        return None
    if options.remote is not None or asked is None:
        _trust(address)
    return address


def _agreed(recipe: Recipe, address: str) -> bool:
    """Whether the user agreed to the remote that a recipe names, now or before."""
    if full_address(address) in trusted_remotes():
        return True
    what = f"{recipe.path}: names the remote cache {address!r}"
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        print(f"{what}, which is not used until you agree: pass --trust-remote once", file=sys.stderr)
        return False
    print(
        f"{what}. Whoever writes to it decides what its results hold, and what you make is sent there. Use it, now and later? "
        "[y/N] ",
        end="",
        flush=True,
        file=sys.stderr,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _trust(address: str) -> None:
    if file := trust(full_address(address)):
        print(f"results of {full_address(address)!r} count from now on ({file})", file=sys.stderr)


def open_remote_of(options: argparse.Namespace, recipe: Recipe) -> "Remote":
    """The remote that the options, the environment or the recipe name; RecipeError if none does, or the user did not agree."""
    from runner.cache.remote import open_remote

    address = remote_of(options, recipe)
    if address is None:
        raise RecipeError(
            f"{recipe.path}: expected a [cache] remote there that you agree to (--trust-remote), or one in STOCKPOT_REMOTE or "
            "--remote, got none"
        )
    return open_remote(address)


def plan_of(options: argparse.Namespace, recipe: Recipe, *, needed: "Callable[[Plan], Iterable[Entry]]") -> "Plan":
    """The plan; what `needed` gives is fetched from the remote of the options, the environment or the recipe."""
    from runner.planning.fetched import fetched_plan

    def note(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    return fetched_plan(recipe, store_of(options), remote_of(options, recipe), needed=needed, note=note)


def store_of(options: argparse.Namespace, recipe: Path | None = None) -> Store:
    """The cache that the options, the environment or the recipe's folder name; without a recipe, that of the current
    folder."""
    store = Store(cache_of(recipe or getattr(options, "recipe", None) or Path("recipe.toml"), options.cache))
    store.digests.rereads = getattr(options, "check_inputs", False)
    if named := os.environ.get("STOCKPOT_REMOTE"):
        store.origins.named.add(full_address(named))
    return store


def make_view(expected: Callable[[], Mapping[str, float]], *, as_json: bool = False) -> RunView:
    """A live view on a terminal, plain lines elsewhere, JSON on standard output if `as_json`.

    `expected` gives the estimated seconds of stages, as far as known; only the live view calls it.
    """
    if as_json:
        return JsonView(sys.stdout)
    if not sys.stderr.isatty():
        return PlainView(sys.stderr)
    from runner.reporting.live import LiveView

    return LiveView(expected())
