"""Shell completion of commands, options, files, and the stages of the recipe on the command line.

eval "$(register-python-argcomplete run)"       # in ~/.bashrc or ~/.zshrc
"""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any


def is_asked() -> bool:
    """Whether the shell runs this process for completions."""
    return "_ARGCOMPLETE" in os.environ


def propose(parser: argparse.ArgumentParser, commands: Sequence[str]) -> None:
    """Answers the shell and ends the process. `run RECIPE ...` completes as `run run RECIPE ...`, which it is short for."""
    import argcomplete

    line, point = os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0"))
    program, space, rest = line.partition(" ")
    first, gap, _ = rest.lstrip().partition(" ")
    if gap and first not in commands and not first.startswith("-") and point > len(program):
        os.environ["COMP_LINE"] = f"{program}{space}run {rest}"
        os.environ["COMP_POINT"] = str(point + len("run "))
    argcomplete.autocomplete(parser)


def stages(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The stages of the recipe on the command line; none if it cannot be read. Other names a shell might run."""
    from runner.errors import RecipeError
    from runner.input_files import AllowedFolders
    from runner.recipe.toml import read_with_parents
    from runner.stage import NAME

    recipe = getattr(parsed_args, "recipe", None)
    if recipe is None:
        return []
    try:
        tables = read_with_parents(recipe, (), AllowedFolders(recipe.resolve().parent, ())).get("stage")
    except RecipeError:
        return []
    return [name for name in tables if re.fullmatch(NAME, name)] if isinstance(tables, dict) else []
