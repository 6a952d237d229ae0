"""The sources of a corpus, read one after the other and cut into shards of work. `llm.text.shards` processes the shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llm.text.readers import AS_FOUND, FileFormat, read_rows
from llm.text.readers.rows import FileRow
from llm.text.templates import split_text


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
        rows: list[FileRow] = []
        size = 0
        for row in rows_of(source):
            rows.append(row)
            size += _size(row)
            if size >= shard_bytes:
                yield Shard(index, number, rows)
                index, rows, size = index + 1, [], 0
        if rows:
            yield Shard(index, number, rows)
            index += 1


def rows_of(source: Source) -> Iterator[FileRow]:
    """The rows of a source, in order, up to its limit."""
    return islice(_all_rows(source), source.limit)


def _all_rows(source: Source) -> Iterator[FileRow]:
    if source.rows is not None:
        for number, row in enumerate(source.rows(), start=1):
            yield FileRow(source.place, number, dict(row))
    yield from read_rows(source.files, {*split_text(source.text)[1::2], *source.where}, source.form)


def _size(row: FileRow) -> int:
    if isinstance(row.content, dict):
        return sum(len(value) for value in row.content.values() if isinstance(value, str)) + 1
    return len(row.content) + 1
