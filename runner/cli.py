"""The command line: arguments in, exit code out. Each command is a file in `runner.commands`."""

import argparse
import codecs
import io
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import runner.commands
from runner import completion
from runner.credentials import redact
from runner.errors import EXIT_INTERRUPTED, RecipeError, StockpotError
from runner.files import DISK_FULL
from runner.options import recipe_names, recipe_path
from runner.recipe.validation import nearest
from runner.terminal import printable_streams

WORD = re.compile("[a-z][a-z-]*")  # like a command, unlike the path of a recipe
OVERVIEW = """\
One TOML recipe in, a published language model out.

  run RECIPE          makes the model of a recipe; finished stages come from the cache
  run plan RECIPE     what would run, why, and how long it takes
  run new FILE        writes a recipe for your own data
  run chat RECIPE     talks to the model
  run report RECIPE   a page with scores, curves and answers

`run --help` lists all commands, `run COMMAND --help` their options. Recipes, as in `run quickstart`:
"""
COMMANDS = [module.name.replace("_", "-") for module in pkgutil.iter_modules(runner.commands.__path__)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; the entry point of the console script `run`."""
    if completion.is_asked():
        completion.propose(_parser(()), COMMANDS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PRINTABLE)
    with printable_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        return _print_overview()
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"stockpot {version('stockpot')}")
        return 0
    if words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        if WORD.fullmatch(words[0]) and not recipe_path(words[0]).exists():
            print(_unknown(words[0]), file=sys.stderr)
            return RecipeError.exit_code
        words.insert(0, "run")
    options = _parser(words[:1]).parse_args(words)
    options.words = words
    try:
        return int(_module(options.command).main(options))
    except StockpotError as error:
        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted; finished and checkpointed work is kept, and the same command continues from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        hint = "; free some space and run again, finished work is kept" if error.errno in DISK_FULL else ""
        print(f"{error.strerror or error}{place}{hint}", file=sys.stderr)
        return 3


def _print_overview() -> int:
    from runner.commands.list import description

    print(OVERVIEW)
    names = recipe_names()
    for name, path in names.items():
        print(f"  {name:<{max(map(len, names))}}   {description(path)}")
    return 0


def _unknown(word: str) -> str:
    known = [*COMMANDS, *recipe_names()]
    return (
        f"run {word}: no such command or recipe; expected a path, a command ({', '.join(COMMANDS)}) or a recipe "
        f"({', '.join(recipe_names())}){nearest(word, known)}"
    )


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """For characters that the terminal cannot show: the raw bytes of an undecodable file name, else an escape sequence."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


PRINTABLE = "stockpot.printable"
codecs.register_error(PRINTABLE, _printable)


def _module(command: str) -> ModuleType:
    return import_module(f"{runner.commands.__name__}.{command.replace('-', '_')}")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line that begins with `words`; if they name a command, only that one is imported."""
    parser = argparse.ArgumentParser(
        prog="run",
        description="One TOML recipe in, a published language model out. `run RECIPE` is short for `run run RECIPE`.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in [word for word in words if word in COMMANDS] or COMMANDS:
        module = _module(command)
        sub = commands.add_parser(command, help=module.main.__doc__, description=module.main.__doc__)
        module.add_options(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
