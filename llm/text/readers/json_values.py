"""The values of a `.json` file: an array of rows, or values one after the other, on a line each or on several."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.text.readers.rows import FileRow, RowFault, not_utf8, refuse_constant
from llm.text.readers.streams import lines

_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
_ANY_NUMBER = json.JSONDecoder(parse_constant=str, parse_int=str, parse_float=str)  # finds the end of a value that is refused


def read_json(path: Path, encoding: str | None) -> Iterator[FileRow]:
    """A row for each object; at most two of them are in memory, with the lines they are on."""
    pending, number, opened = "", 1, False
    needed = 1  # characters to have before the next try: a value over many lines is not tried again with each of them
    faults: dict[int, RowFault] = {}  # by line that is not UTF-8
    for at, line in enumerate(lines(path, encoding), start=1):
        try:
            pending += line.decode() + "\n"
        except UnicodeDecodeError as error:
            faults[at] = RowFault(not_utf8(error))
            pending += line.decode(errors="replace") + "\n"
        if len(pending) < needed:
            continue
        rows, pending, number, opened = _taken(str(path), pending, number, opened, faults)
        yield from rows
        needed = 2 * len(pending)
    rows, pending, number, opened = _taken(str(path), pending, number, opened, faults)
    yield from rows
    if pending.strip(" \t\r\n]"):
        raise InputError(f"{path}:{number}: expected JSON, got {pending[:40]!r}, which does not end or is none")


def _taken(
    path: str, text: str, number: int, opened: bool, faults: Mapping[int, RowFault]
) -> tuple[list[FileRow], str, int, bool]:
    """The rows of whole values at the beginning of `text`, the rest, its line, and whether an array is open."""
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
