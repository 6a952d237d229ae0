"""The command line: arguments in, exit code out. Each command is a file in `runner.commands`."""

import argparse
import codecs
import io
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import runner.commands
from runner import completion
from runner.credentials import redact
from runner.errors import RecipeError, StockpotError
from runner.files import DISK_FULL
from runner.recipe.validation import listed, nearest

EXIT_INTERRUPTED = 130
WORD = re.compile("[a-z][a-z-]*")  # like a command, unlike the path of a recipe
COMMANDS = [module.name.replace("_", "-") for module in pkgutil.iter_modules(runner.commands.__path__)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; the entry point of the console script `run`."""
    if completion.is_asked():
        completion.propose(_parser(()), COMMANDS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in (*COMMANDS, "-h", "--help"):
        if WORD.fullmatch(words[0]) and not Path(words[0]).exists():
            print(
                f"run {words[0]}: no such command; expected a recipe or one of "
                f"{listed(COMMANDS)}{nearest(words[0], COMMANDS)}",
                file=sys.stderr,
            )
            return RecipeError.exit_code
        words.insert(0, "run")
    options = _parser(words[:1]).parse_args(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PRINTABLE)
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in [word for word in words if word in COMMANDS] or COMMANDS:
        module = _module(command)
        sub = commands.add_parser(command, help=module.main.__doc__, description=module.main.__doc__)
        module.add_options(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
