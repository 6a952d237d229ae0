"""The messages in the sources of `llm` and `runner`, read by `ast`: what is raised, warned or noted, with gaps for values.

A message is one literal, or literals joined by +. One that is put together out of single words is not seen.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GAP = "\N{HORIZONTAL ELLIPSIS}"  # in place of a value
SPEAKS = re.compile(r"\bexpected\b|\bgot\b|\bwants?\b|^warning: |did you mean")  # a message wherever it stands
DATA = {
    "add_parser",
    "add_argument",
    "add_argument_group",
    "compile",
    "search",
    "startswith",
    "Field",
}  # calls without messages
WORDS = 9  # letters below which a text only passes another on
LONGEST = 400  # characters; a longer text is a page or a template


@dataclass(frozen=True)
class Message:
    """One message of the sources."""

    file: str  # relative to the root
    line: int
    text: str  # values as GAP
    error: str | None  # the class that is raised with it

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@cache
def messages() -> list[Message]:
    """Each message of `runner` and `llm`."""
    files = (path for folder in ("runner", "llm") for path in sorted((ROOT / folder).rglob("*.py")))
    return [message for path in files for message in _messages_in(path)]


def _messages_in(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    silent = {id(part) for node in ast.walk(tree) if _is_silent(node) for part in ast.walk(node)}
    raised = {id(argument): error for node in ast.walk(tree) for argument, error in _raised(node)}
    inside: set[int] = set()
    for node in ast.walk(tree):  # outer nodes first
        if id(node) in silent or id(node) in inside or not isinstance(node, ast.expr) or (text := _text(node)) is None:
            continue
        inside |= {id(part) for part in ast.walk(node)} - _alternatives(node)
        if (id(node) in raised or SPEAKS.search(text)) and _is_sentence(text):
            yield Message(name, node.lineno, re.sub(r"\s+", " ", text), raised.get(id(node)))


def _is_sentence(text: str) -> bool:
    return len(re.findall("[A-Za-z]", text)) >= WORDS and " " in text.strip() and len(text) <= LONGEST


def _is_silent(node: ast.AST) -> bool:
    """Docstrings, assertions, and the help of the command line."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Assert():
            return True
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in DATA
    return False


def _raised(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The arguments of an error that is raised or made, with its class; of what redacts a message likewise."""
    match node:
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=arguments) if name.endswith("Error"):
            for argument in arguments:
                yield argument, name
                if isinstance(argument, ast.Call):
                    yield from ((inner, name) for inner in argument.args)


def _alternatives(node: ast.AST) -> set[int]:
    """The branches of conditions inside a text: each may be a text of its own."""
    branches = [branch for part in ast.walk(node) if isinstance(part, ast.IfExp) for branch in (part.body, part.orelse)]
    return {id(part) for branch in branches for part in ast.walk(branch)}


def _text(node: ast.AST) -> str | None:
    """A literal with GAP for each value; None if it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or GAP for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if (before := _text(left)) is not None:
            return before + (_text(right) or GAP)
    return None
