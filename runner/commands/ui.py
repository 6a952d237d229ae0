"""`run ui`: aim's user interface for the curves of a cache."""

import argparse
import base64
import importlib.util
import json
import os
import subprocess
import sys
from urllib.parse import quote

from runner.errors import RecipeError
from runner.options import add_cache_arguments, add_recipe_options, recipe_of, store_of
from runner.safe_path import PYTHON, safe_environment

COMMAND = "from aim.cli.cli import cli_entry_point; cli_entry_point()"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_cache_arguments(sub)
    add_recipe_options(sub)
    sub.add_argument("--port", type=int, default=43800, help="(default: 43800)")


def main(options: argparse.Namespace) -> int:
    """Starts aim with the curves of all trainings of a cache, and prints the address of the losses of a recipe."""
    if importlib.util.find_spec("aim") is None:
        raise RecipeError(
            "ui: expected the package aim, but it is not installed (it has no release for Python 3.13 and newer)"
        )
    repo = store_of(options).root / "aim"
    if not (repo / ".aim").is_dir():
        raise RecipeError(f"{repo}: expected curves, but there are none yet; a run with a training makes them")
    chosen = losses_of(recipe_of(options).head.name if options.recipe else None)
    print(f"losses by step, in a minute: http://127.0.0.1:{options.port}/metrics?select={chosen}", file=sys.stderr, flush=True)
    words = ["up", "--repo", str(repo), "--host", "127.0.0.1", "--port", str(options.port)]
    command = [*PYTHON, "-c", COMMAND, *words]
    try:
        return subprocess.run(command, env=safe_environment(dict(os.environ)), check=False).returncode
    except KeyboardInterrupt:
        return 0


def losses_of(experiment: str | None) -> str:
    """The choice of the losses of an experiment, or of all, in an address of aim's metrics: as `aim64encode` of its page."""
    names = [{"label": "loss", "group": "loss", "key": "loss", "value": {"option_name": "loss", "context": None}}]
    query = f"run.experiment == {json.dumps(experiment)}" if experiment else ""
    chosen = {"options": names, "query": query, "advancedMode": False, "advancedQuery": ""}
    text = quote(json.dumps(chosen), safe="!#$&'()*+,/:;=?@-._~")  # what JavaScript's encodeURI leaves
    return "O-" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
