"""`run list`: recipes with the hardware, time and result that their headers name."""

import argparse
import re
from pathlib import Path

import tomli

from runner.errors import RecipeError
from runner.files import read_bounded
from runner.options import SHIPPED
from runner.recipe.toml import LARGEST

FACTS = ("Hardware", "Time", "Result")  # first words of the lines in a recipe's header


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    help = "a folder of recipes (default: the shipped ones)"
    sub.add_argument("folder", type=Path, nargs="?", default=SHIPPED, metavar="FOLDER", help=help)


def main(options: argparse.Namespace) -> int:
    """Lists recipes with their result, hardware and time."""
    if not options.folder.is_dir():
        raise RecipeError(f"{options.folder}: expected a folder of recipes, but there is none")
    for path in sorted(options.folder.glob("*.toml")):
        words = description(path)
        print(f"{path.name}: {words}" if words else path.name)
        for fact, value in header(_text(path)).items():
            print(f"  {fact.lower()}: {value}")
    return 0


def description(path: Path) -> str:
    """What a recipe says of itself, or why it cannot be read."""
    try:
        return str(tomli.loads(_text(path)).get("description", ""))
    except (ValueError, RecursionError) as error:
        return f"is not TOML: {error}"


def _text(path: Path) -> str:
    """The text of a file; empty for what is none, such as a folder or a pipe, of which reading may never end."""
    try:
        return read_bounded(path, LARGEST).decode(errors="replace")
    except OSError:
        return ""


def header(text: str) -> dict[str, str]:
    """The facts in the comments at the top of a recipe; an indented line continues the one before."""
    comments = re.match(r"(?:#.*\n)*", text)
    facts: dict[str, str] = {}
    name = None
    for line in comments[0].splitlines() if comments else ():
        begun = re.match(rf"#\s*({'|'.join(FACTS)}):\s*(.*)", line)
        if begun:
            name, facts[begun[1]] = begun[1], begun[2]
        elif name and re.match(r"#\s{2,}\S", line):
            facts[name] += " " + line.lstrip("# ")
        else:
            name = None
    return facts
