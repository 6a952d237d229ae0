"""The sources of a corpus, read one after the other and cut into shards of work. `llm.text.shards` processes the shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llm.text.readers import AS_FOUND, FileFormat, read_rows
from llm.text.readers.rows import FileRow
from llm.text.templates import split_text

ROW_BYTES = 32  # that a row takes however short it is


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one source: the unit of work."""

    index: int  # counts through all sources
    source: int
    rows: list[FileRow]


@dataclass(frozen=True)
class Source:
    """One source of a corpus. Its rows come from `files`, or from the caller's `rows`."""

    name: str
    files: tuple[Path, ...] = ()
    rows: Callable[[], Iterable[Mapping[str, Any]]] | None = field(default=None, compare=False)
    place: str = ""  # the name of `rows` in messages
    text: str = "text"  # a field, or a template over fields: "{title}\n{text}"
    weight: float = 1.0  # passes over the source; a fraction selects documents by hash
    language: str | None = None  # of rows without a field `language`
    where: Mapping[str, str | int | bool] = field(default_factory=dict)  # keeps only rows whose fields equal these
    limit: int | None = None  # rows to read at most
    form: FileFormat = AS_FOUND  # of the files


def cut_into_shards(sources: Iterable[Source], shard_bytes: int) -> Iterator[Shard]:
    """All rows of all sources, in order, in shards of about `shard_bytes` bytes; a shard has rows of one source."""
    index = 0
    for number, source in enumerate(sources):
        for rows in rows_by_size(rows_of(source), shard_bytes):
            yield Shard(index, number, rows)
            index += 1


def rows_by_size(rows: Iterable[FileRow], size: int) -> Iterator[list[FileRow]]:
    """The rows as lists of about `size` bytes each."""
    found: list[FileRow] = []
    filled = 0
    for row in rows:
        found.append(row)
        filled += _size(row.content) + ROW_BYTES
        if filled >= size:
            yield found
            found, filled = [], 0
    if found:
        yield found


def rows_of(source: Source) -> Iterator[FileRow]:
    """The rows of a source, in order, up to its limit."""
    return islice(_all_rows(source), source.limit)


def _all_rows(source: Source) -> Iterator[FileRow]:
    if source.rows is not None:
        for number, row in enumerate(source.rows(), start=1):
            yield FileRow(source.place, number, dict(row))
    yield from read_rows(source.files, {*split_text(source.text)[1::2], *source.where}, source.form)


def _size(value: Any) -> int:
    """Bytes or characters in a value of JSON, or in a line of it."""
    match value:
        case str() | bytes():
            return len(value)
        case list() | tuple():
            return sum(_size(item) for item in value) + len(value)
        case Mapping():
            return sum(len(str(name)) + _size(of_it) for name, of_it in value.items())
    return 1
