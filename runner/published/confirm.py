"""Shows a published model before it runs here, and asks the user to confirm."""

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
    """Prints which stages are reused or run, how this machine differs from the lock file's, and which files are missing."""
    _print(f"{published.name}, now {published.recipe}")
    comparison = compared(published.lock, plan)
    rows = [(entry.name, entry.stage.kind, entry.state, comparison[entry.name]) for entry in plan]
    _print("\n".join(text_table(rows)))
    if lines := list(differences(published.lock)):
        _print("\ndifferences from the machine it was made on:")
        _print("\n".join(f"  {line}" for line in lines))
    if lines := list(_missing(published, plan)):
        _print("\nmissing input files, by name and sha256 (pass their folder with --data DIR):")
        _print("\n".join(lines))


def refuse_if_stuck(published: Published, plan: Plan) -> None:
    """RecipeError if a stage has to run whose input files are missing."""
    if stuck := [entry.name for entry in plan if entry.state in RUNNABLE and _absent(published, entry.stage)]:
        raise RecipeError(
            f"{published.name}: the input files of {', '.join(stuck)} are missing; pass their folder with "
            f"--data DIR, or a cache "
            "with their results with --remote"
        )


def agreed(published: Published, *, yes: bool) -> bool:
    """Whether the user confirms the run; RecipeError without a terminal."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise RecipeError(f"{published.name}: not run, since there is no terminal for a confirmation; pass --yes to run it")
    print("\nRun it? [y/N] ", end="", flush=True, file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _absent(published: Published, stage: Stage) -> dict[str, Sequence[FileContent]]:
    """The missing input files of a stage, by field."""
    places = {field: str(file.folder / file) for field, file in input_files(stage)}
    return {field: published.absent[place] for field, place in places.items() if place in published.absent}


def _missing(published: Published, plan: Plan) -> Iterator[str]:
    for entry in plan:
        for field, contents in _absent(published, entry.stage).items():
            reused = ", whose result is reused" if entry.state not in (*RUNNABLE, "waiting") else ""
            yield f"  stage.{entry.name}.{field}{reused}:"
            yield from (f"    {content.file}  {content.sha256}" for content in contents)


def _print(text: str) -> None:
    """Prints to the user."""
    print(text, file=sys.stderr)
