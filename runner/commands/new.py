"""`run new`: five questions, and a commented recipe that validates and plans."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from runner.errors import RecipeError
from runner.recipe.new_recipe import Answers, Hardware, Language, recipe_text
from runner.recipe.recipe import load_recipe
from runner.resources import gpu_count

SHIPPED = Path(__file__).parents[2] / "recipes"
LANGUAGES: tuple[Language, ...] = ("en", "zh", "both")
HARDWARE: tuple[Hardware, ...] = ("cpu", "gpu")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="the TOML file to write; in the folder of the shipped recipes if it names no folder",
    )
    sub.add_argument("--language", choices=LANGUAGES, help="of the model")
    sub.add_argument("--data", metavar="FILE", help="rows of your domain (jsonl, csv or parquet); '' for none")
    sub.add_argument("--hardware", choices=HARDWARE, help="for training")
    sub.add_argument("--minutes", type=float, metavar="N", help="time limit of the whole recipe")
    sub.add_argument("--repo", metavar="OWNER/NAME", help="Hub repository to publish to; '' for none")


def main(options: argparse.Namespace) -> int:
    """Asks five questions (language, domain data, hardware, time, Hub repository) and writes a recipe."""
    path: Path = options.recipe if options.recipe.parent != Path() else SHIPPED / options.recipe
    path = path.with_suffix(".toml")
    if path.exists():
        raise RecipeError(f"{path}: expected the name of a new file, but it exists")
    if not re.fullmatch(r"[\w.-]+", path.stem):
        raise RecipeError(f"RECIPE: expected a name of letters, digits, '.', '-' and '_', got {path.name!r}")
    best: Hardware = "gpu" if gpu_count() else "cpu"
    language = _answer(options.language, "language of the model", LANGUAGES, "en")
    data = _answer(options.data, "file with rows of your domain (empty for none)", None, "", check=_is_file)
    hardware = _answer(options.hardware, "hardware to train on", HARDWARE, best)
    minutes = _answer(options.minutes, "minutes for the whole recipe", None, "30", check=_minutes)
    repo = _answer(options.repo, "owner/name of the Hub repository to publish to (empty for none)", None, "", check=_repo)
    answers = Answers(
        name=path.stem,
        language=language,  # type: ignore[arg-type]  # one of LANGUAGES
        data=os.path.relpath(Path(data).resolve(), path.parent.resolve()) if data else None,
        fields=_fields(Path(data)) if data else (),
        hardware=hardware,  # type: ignore[arg-type]  # one of HARDWARE
        minutes=float(minutes),
        repo=repo or None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(answers), encoding="utf-8")
    outside = [Path(data).resolve().parent] if data else []
    load_recipe(path, allowed=outside)
    is_inside = not data or Path(data).resolve().is_relative_to(path.parent.resolve())
    allow = "" if is_inside else f" --allow-path {shlex.quote(str(outside[0]))}"
    named = shlex.quote(os.path.relpath(path))
    print(f"wrote {path}\nread it, then:\n  run plan {named}{allow}\n  run {named}{allow}")
    return 0


def _answer(
    given: object,
    question: str,
    choices: tuple[str, ...] | None,
    default: str,
    check: Callable[[str], str | None] | None = None,
) -> str:
    """The value on the command line, else the user's answer, else (without a terminal) the default."""
    fault = check or (
        lambda text: None if not choices or text in choices else f"expected one of {', '.join(choices)}, got {text!r}"
    )
    if given is not None or not sys.stdin.isatty():
        text = default if given is None else str(given)
        if found := fault(text):
            raise RecipeError(f"{question}: {found}")
        return text
    shown = f" ({' / '.join(choices)})" if choices else ""
    while True:
        text = input(f"{question}{shown} [{default}]: ").strip() or default
        found = fault(text)
        if found is None:
            return text
        print(f"  {found}")


def _is_file(text: str) -> str | None:
    return None if not text or Path(text).is_file() else f"expected a file, got none at {text}"


def _minutes(text: str) -> str | None:
    try:
        return None if 0 < float(text) < 1e6 else f"expected more than 0, got {text}"
    except ValueError:
        return f"expected a number, got {text!r}"


def _repo(text: str) -> str | None:
    return None if not text or re.fullmatch(r"([\w.-]+/)?[\w.-]+", text) else f"expected owner/name, got {text!r}"


def _fields(path: Path) -> list[str]:
    """The fields of the first row."""
    from llm.errors import InputError
    from llm.text.readers import field_names

    try:
        return field_names(path)
    except InputError as error:
        raise RecipeError(str(error)) from error
