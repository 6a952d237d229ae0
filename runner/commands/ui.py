"""`run ui`: aim's user interface for the curves of a cache."""

import argparse
import importlib.util
import os
import subprocess

from runner.errors import RecipeError
from runner.options import add_cache_arguments, store_of
from runner.safe_path import PYTHON, safe_environment

COMMAND = "from aim.cli.cli import cli_entry_point; cli_entry_point()"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_cache_arguments(sub)
    sub.add_argument("--port", type=int, default=43800, help="(default: 43800)")


def main(options: argparse.Namespace) -> int:
    """Starts aim with the curves of all trainings of a cache, at http://127.0.0.1:43800."""
    if importlib.util.find_spec("aim") is None:
        raise RecipeError(
            "ui: expected the package aim, but it is not installed (it has no release for Python 3.13 and newer)"
        )
    repo = store_of(options).root / "aim"
    if not (repo / ".aim").is_dir():
        raise RecipeError(f"{repo}: expected curves, but there are none yet; a run with a training makes them")
    words = ["up", "--repo", str(repo), "--host", "127.0.0.1", "--port", str(options.port)]
    command = [*PYTHON, "-c", COMMAND, *words]
    try:
        return subprocess.run(command, env=safe_environment(dict(os.environ)), check=False).returncode
    except KeyboardInterrupt:
        return 0
