"""Where text comes from: files and iterables of rows, read one after the other and cut into shards of work.

Reading is sequential and cheap: decompress, split into lines, hand on. Parsing and everything after it happens in
`llm.text.shards`, in as many processes as there are cores. Nothing here judges a text.

A file's format is its suffix: `.jsonl` (an object a line), `.txt` (the whole file is one document, its field is `text`),
`.csv` and `.tsv` (the first line names the fields; in `.tsv` a quotation mark is a character like any other), each also with
`.gz` or `.zst`, and `.parquet`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.text.readers import FileRow, read_rows
from llm.text.templates import split_text


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one source: the unit of work."""

    index: int  # counts through all sources
    source: int
    rows: list[FileRow]


@dataclass(frozen=True)
class Source:
    """One source of a corpus. Rows come from `files`, or from `rows` where the caller knows how to get them."""

    name: str
    files: tuple[Path, ...] = ()
    rows: Callable[[], Iterable[Mapping[str, Any]]] | None = field(default=None, compare=False)
    place: str = ""  # what `rows` are called in messages
    text: str = "text"  # a field, or a template over fields: "{title}\n{text}"
    weight: float = 1.0  # passes over the source; a fraction chooses documents by hash
    language: str | None = None  # of rows that do not tell theirs in a field `language`
    where: Mapping[str, str | int | bool] = field(default_factory=dict)  # only rows whose fields equal these
    limit: int | None = None  # rows read at most


def cut_into_shards(sources: Iterable[Source], shard_bytes: int) -> Iterator[Shard]:
    """All rows of all sources, in order, in shards of about `shard_bytes` bytes; a shard holds rows of one source."""
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
    """The rows of a source, in order, as many as its limit lets through."""
    left = source.limit
    for row in _all_rows(source):
        if left is not None:
            if left == 0:
                return
            left -= 1
        yield row


def _all_rows(source: Source) -> Iterator[FileRow]:
    if source.rows is not None:
        for number, row in enumerate(source.rows(), start=1):
            yield FileRow(source.place, number, dict(row))
    yield from read_rows(source.files, {*split_text(source.text)[1::2], *source.where})


def _size(row: FileRow) -> int:
    if isinstance(row.content, dict):
        return sum(len(value) for value in row.content.values() if isinstance(value, str)) + 1
    return len(row.content) + 1
