"""The values of a `.json` file: an array of rows, or values one after the other, on a line each or on several."""

import json
from collections.abc import Iterator
from pathlib import Path

from llm.errors import InputError
from llm.text.readers.rows import FileRow, RowFault, refuse_constant
from llm.text.readers.streams import lines

_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def read_json(path: Path, encoding: str | None) -> Iterator[FileRow]:
    """A row for each object; at most two of them are in memory, with the lines they are on."""
    pending, number, opened = "", 1, False
    needed = 1  # characters to have before the next try: a value over many lines is not tried again with each of them
    for line in lines(path, encoding):
        try:
            pending += line.decode() + "\n"
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: expected UTF-8, got other bytes ({error.reason})") from error
        if len(pending) < needed:
            continue
        rows, pending, number, opened = _taken(str(path), pending, number, opened)
        yield from rows
        needed = 2 * len(pending)
    rows, pending, number, opened = _taken(str(path), pending, number, opened)
    yield from rows
    if pending.strip(" \t\r\n]"):
        raise InputError(f"{path}:{number}: expected JSON, got {pending[:40]!r}, which does not end or is none")


def _taken(path: str, text: str, number: int, opened: bool) -> tuple[list[FileRow], str, int, bool]:
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
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError:
            return rows, text[place:], number, opened
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: expected JSON, got something else: {error}") from error
        if isinstance(value, dict):
            rows.append(FileRow(path, number, value))
        else:
            rows.append(FileRow(path, number, RowFault(f"expected an object with fields, got {_brief(value)}")))
        number += text.count("\n", place, end)
        place = end


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 40 else f"{text[:40]} ..."
