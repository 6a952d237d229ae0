"""What is shown of a published model before it is run here, and the question whether to."""

import sys
from collections.abc import Iterator, Sequence

from runner.cache.digests import FileContent
from runner.errors import RecipeError
from runner.graph import input_files
from runner.planning.plan import RUNNABLE, Plan
from runner.planning.text_table import text_table
from runner.published.lockfile import compared, differences
from runner.published.recipe import Published
from runner.stage import Stage


def show(published: Published, plan: Plan) -> None:
    """Prints what would be reused and what made, how this machine differs from those of the lock, and what is missing."""
    _say(f"{published.name}, now {published.recipe}")
    told = compared(published.lock, plan)
    rows = [(entry.name, entry.stage.kind, entry.state, told[entry.name]) for entry in plan]
    _say("\n".join(text_table(rows)))
    if lines := list(differences(published.lock)):
        _say("\nunlike what it was made with:")
        _say("\n".join(f"  {line}" for line in lines))
    if lines := list(_missing(published, plan)):
        _say("\ninput files that were not found, by name and sha256 (pass their folder with --data DIR):")
        _say("\n".join(lines))


def refuse_if_stuck(published: Published, plan: Plan) -> None:
    """RecipeError if a stage has to run whose input files are missing."""
    if stuck := [entry.name for entry in plan if entry.state in RUNNABLE and _absent(published, entry.stage)]:
        raise RecipeError(
            f"{published.name}: {', '.join(stuck)} would have to run without input files; pass their folder with --data DIR, "
            "or a cache that holds what they make with --remote"
        )


def agreed(published: Published, *, yes: bool) -> bool:
    """Whether the user wants it run; RecipeError if there is nobody to ask."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise RecipeError(f"{published.name}: nothing was run, since there is no terminal to ask at; pass --yes to run it")
    print("\nRun it? [y/N] ", end="", flush=True, file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _absent(published: Published, stage: Stage) -> dict[str, Sequence[FileContent]]:
    """The input files of a stage that are missing, by field."""
    places = {field: str(file.folder / file) for field, file in input_files(stage)}
    return {field: published.absent[place] for field, place in places.items() if place in published.absent}


def _missing(published: Published, plan: Plan) -> Iterator[str]:
    for entry in plan:
        for field, contents in _absent(published, entry.stage).items():
            reused = ", whose result is reused" if entry.state not in (*RUNNABLE, "waiting") else ""
            yield f"  stage.{entry.name}.{field}{reused}:"
            yield from (f"    {content.file}  {content.sha256}" for content in contents)


def _say(text: str) -> None:
    """To the user, in words of a stranger: without what a terminal would obey."""
    print("".join(character if character.isprintable() or character == "\n" else "?" for character in text), file=sys.stderr)
