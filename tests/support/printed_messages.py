"""What the sources can tell a user, read by `ast`: raised texts, warnings, notes, and whatever says what is wanted or found.

A text is known by its constant parts, in order. So a message has to be one literal, or literals joined by +; one that is put
together out of single words is not seen.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLD_BY = {"note", "_note", "_warn", "_unmarked", "_unsupported", "Fault"}  # functions whose words reach the user
TOLD_AS = {"note", "reason", "because"}  # keywords whose words do
KEPT_AS = {"text", "told", "fault", "doubt"}  # names that hold words for the user
RETURNED_BY = re.compile("fault|failure|nothing|how_to|^sentence$|^_next$")  # functions that return them
SPEAKS = re.compile(
    r"\bexpected\b|\bgot\b|\bwant(s|ed)?\b|\bfound\b|^warning: |; set aside in |did not|cannot be| is not |does not |another |run again"
)
WORDS = 9  # letters of constant text below which a text only passes on another
LONGEST = 400  # characters; beyond them it is a page or a template, and no message


@dataclass(frozen=True)
class Message:
    """One text of the sources."""

    file: str  # relative to the root
    line: int
    parts: tuple[str, ...]  # what is constant in it, in order

    def pattern(self) -> re.Pattern[str]:
        """Matches an entry that has all of it."""
        return re.compile(".*?".join(re.escape(part.strip()) for part in self.parts))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {' ... '.join(self.parts)}"


@cache
def messages() -> list[Message]:
    """Each text of `runner` and `llm` that a user may read as an error, a warning or a note."""
    files = (path for folder in ("runner", "llm") for path in sorted((ROOT / folder).rglob("*.py")))
    return [message for path in files for message in _messages_in(path)]


def _messages_in(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    silent = {id(part) for node in ast.walk(tree) if _is_silent(node) for part in ast.walk(node)}
    told = {id(text) for node in ast.walk(tree) for text in _told(node)}
    inside: set[int] = set()
    for node in ast.walk(tree):  # outer nodes first
        if id(node) in silent or id(node) in inside or not (parts := _constants(node)):
            continue
        inside |= {id(part) for part in ast.walk(node)} - _alternatives(node)
        text = "...".join(parts)
        if (id(node) in told or SPEAKS.search(text)) and _is_sentence(text):
            yield Message(name, node.lineno, parts)  # type: ignore[attr-defined]  # an expression has a line


def _is_sentence(text: str) -> bool:
    words = len(re.findall("[A-Za-z]", text))
    return words >= WORDS and " " in text.strip() and len(text) <= LONGEST and not text.startswith("<")


def _alternatives(node: ast.AST) -> set[int]:
    """The branches of conditions inside a text: each may be a text of its own."""
    branches = [branch for part in ast.walk(node) if isinstance(part, ast.IfExp) for branch in (part.body, part.orelse)]
    return {id(part) for branch in branches for part in ast.walk(branch)}


def _is_silent(node: ast.AST) -> bool:
    """Docstrings, assertions, help of the command line, and other words that are no message."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Assert():
            return True
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in ("add_parser", "add_argument", "add_argument_group", "compile", "search", "startswith", "Field")
    return False


def _told(node: ast.AST) -> Iterator[ast.AST]:
    """The texts that a node tells for certain."""
    match node:
        case ast.Raise(exc=ast.Call(args=arguments)):
            yield from arguments
            for argument in arguments:
                if isinstance(argument, ast.Call):  # of redact(), say
                    yield from argument.args
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=arguments, keywords=keywords):
            if name in TOLD_BY or name.endswith("Error"):
                yield from arguments
            if name == "print" and any(word.arg == "file" for word in keywords):
                yield from arguments
            yield from (word.value for word in keywords if word.arg in TOLD_AS)
        case ast.Assign(targets=[ast.Name(id=name)], value=text) if name in KEPT_AS:
            yield text
        case ast.FunctionDef(name=name) if RETURNED_BY.search(name):
            yield from (part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None)


def _constants(node: ast.AST) -> tuple[str, ...]:
    """The constant parts of a text, in order; none if it is no text."""
    return tuple(part for part in map(_even, _parts(node)) if part.strip())


def _even(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _parts(node: ast.AST) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            joined: list[str] = []
            for value in values:
                joined += [value.value] if isinstance(value, ast.Constant) and isinstance(value.value, str) else [""]
            return joined
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            before = _parts(left)
            return before + _parts(right) if before else []
    return []
