"""The values of a `.json` file: an array of rows, or values one after the other, on a line each or on several."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.text.readers.rows import FileRow, RowFault, not_utf8, refuse_constant
from llm.text.readers.streams import LONGEST_LINE, PIECE, blocks

_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
_ANY_NUMBER = json.JSONDecoder(parse_constant=str, parse_int=str, parse_float=str)  # finds the end of a value that is refused


def read_json(path: Path, encoding: str | None) -> Iterator[FileRow]:
    """A row for each object. In memory is a block of the file, or the longest object where that is longer."""
    pending, number, opened = "", 1, False
    needed = 1  # characters to have before the next try: a value of many blocks is not tried again with each of them
    faults: dict[int, RowFault] = {}  # by line that is not UTF-8
    for text in _decoded(path, encoding, faults):
        pending += text
        if len(pending) < needed:
            continue
        rows, pending, number, opened = _taken(str(path), pending, number, opened, faults, more=True)
        yield from rows
        needed = 2 * len(pending)
        if len(pending) > LONGEST_LINE:
            raise InputError(
                f"{path}:{number}: expected a value of at most {LONGEST_LINE:,} characters, got a longer one, or one that "
                "does "
                "not end"
            )
    rows, pending, number, opened = _taken(str(path), pending, number, opened, faults, more=False)
    yield from rows
    if pending.strip(" \t\r\n]"):
        raise InputError(f"{path}:{number}: expected JSON, got {pending[:40]!r}, which does not end or is none")


def _decoded(path: Path, encoding: str | None, faults: dict[int, RowFault]) -> Iterator[str]:
    """The text in pieces, most of which end with a line; lines that are not UTF-8 are added to `faults` by their number."""
    rest, number = b"", 1
    for block in blocks(path, encoding):
        content = rest + block
        end = content.rfind(b"\n") + 1
        if not end and len(content) > PIECE:  # a line that goes on
            end = _end_of_characters(content)
        yield _text(content[:end], number, faults)
        number += content.count(b"\n", 0, end)
        rest = content[end:]
    if rest:
        yield _text(rest, number, faults) + "\n"


def _text(content: bytes, number: int, faults: dict[int, RowFault]) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        for at, line in enumerate(content.split(b"\n"), start=number):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                faults[at] = RowFault(not_utf8(error))
        return content.decode(errors="replace")


def _end_of_characters(content: bytes) -> int:
    """Where the last character begins, in case it is not whole."""
    end = len(content) - 1
    while len(content) - end < 4 and content[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _taken(
    path: str, text: str, number: int, opened: bool, faults: Mapping[int, RowFault], *, more: bool
) -> tuple[list[FileRow], str, int, bool]:
    """The rows of whole values at the beginning of `text`, the rest, its line, and whether an array is open; `more` text may
    follow.
    """
    rows: list[FileRow] = []
    place = 0
    while True:
        start = place
        while place < len(text) and (text[place] in " \t\r\n," or (text[place] == "[" and not opened)):
            opened |= text[place] == "["
            place += 1
        number += text.count("\n", start, place)
        if place == len(text) or text[place] == "]":
            return rows, text[place:], number, opened
        try:
            content, end = _value(text, place)
        except json.JSONDecodeError:
            return rows, text[place:], number, opened
        except RecursionError as error:
            raise InputError(f"{path}:{number}: expected JSON, got something else: {error}") from error
        if more and end == len(text):  # a number may go on
            return rows, text[place:], number, opened
        last = number + text.count("\n", place, end)
        content = next((faults[line] for line in range(number, last + 1) if line in faults), content) if faults else content
        rows.append(FileRow(path, number, content))
        number, place = last, end


def _value(text: str, place: int) -> tuple[dict[str, Any] | RowFault, int]:
    """The object that begins at `place`, or why the value cannot be used, and its end; JSONDecodeError if it has none."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        _, end = _ANY_NUMBER.raw_decode(text, place)
        return RowFault(f"expected JSON, got something else: {error}"), end
    return value if isinstance(value, dict) else RowFault(f"expected an object with fields, got {_brief(value)}"), end


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 40 else f"{text[:40]} ..."
