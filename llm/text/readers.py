"""Reads rows from files. The format of a file is its suffix:

* `.jsonl`: one JSON object a line
* `.csv`, `.tsv`: the first line names the fields; in `.tsv` a quotation mark is an ordinary character
* `.txt`: the whole file is one document, in the field `text`
* `.parquet`

All but `.parquet` may also have `.gz` or `.zst`. Reading is sequential and cheap: a line of JSON is parsed by
`FileRow.fields`, so that other processes may do it.
"""

import csv
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llm.errors import InputError
from llm.text import attribution

READ = 1 << 16  # bytes read at a time; a gzip block of this size decompresses to at most 64 MiB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowFault(str):
    """Why a row cannot be read, in place of its content."""


class FileRow(NamedTuple):
    """One row as read: a line of JSON not yet parsed, fields, or the reason why it cannot be read."""

    place: str  # the file, or the dataset
    number: int  # line of the file (row of a parquet file or dataset), from 1
    content: bytes | dict[str, Any] | RowFault

    @property
    def at(self) -> str:
        """Its place, for messages."""
        return f"{self.place}:{self.number}"

    def fields(self) -> Mapping[str, Any]:
        """The row parsed; InputError, without the place, if that fails."""
        content = self.content
        if isinstance(content, RowFault):
            raise InputError(content)
        if isinstance(content, dict):
            return content
        try:
            fields = json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(error, f"byte {error.start + 1}: ")) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"expected one JSON object per line, got a line that is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"expected one JSON object per line, got a {type(fields).__name__}")
        return fields


def read_rows(files: Iterable[Path], needed: set[str]) -> Iterator[FileRow]:
    """The rows of `files`, in order. `needed` are the fields that the caller uses: InputError for a table without one of them.
    Of a Parquet file, only these columns and those of `llm.text.attribution` are read.
    """
    for path in files:
        yield from _FORMATS[_format(path)](path, needed)


def field_names(path: Path) -> list[str]:
    """The names of the fields of a file, from its first row; InputError if there is none."""
    if _format(path) == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(pq.read_schema(path).names)
        except pa.ArrowException as error:
            raise InputError(f"{path}: is not a readable Parquet file ({error})") from error
    if _format(path) == ".txt":  # `read_rows` would read it whole
        return ["text"]
    for row in read_rows([path], set()):
        return list(row.fields())
    raise InputError(f"{path}: expected at least one row, got none")


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    found = suffixes[-1] if suffixes else ""
    if found not in _FORMATS or (found == ".parquet" and path.suffix != ".parquet"):
        raise InputError(f"{path}: expected a file named *.jsonl, *.txt, *.csv or *.tsv (also with .gz or .zst), or *.parquet")
    return found


def _json_lines(path: Path, needed: set[str]) -> Iterator[FileRow]:
    place = str(path)
    for number, line in enumerate(_lines(path), start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if content and not content.isspace():
            yield FileRow(place, number, content)


def _whole_text(path: Path, needed: set[str]) -> Iterator[FileRow]:
    content = b"\n".join(_lines(path)).removeprefix(BYTE_ORDER_MARK)
    try:
        yield FileRow(str(path), 1, {"text": content.decode()})
    except UnicodeDecodeError as error:
        yield FileRow(str(path), content.count(b"\n", 0, error.start) + 1, RowFault(_not_utf8(error)))


def _table(path: Path, needed: set[str], *, name: str, **form: Any) -> Iterator[FileRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a chapter
    table = csv.DictReader(_decoded(path), **form)
    number = 1
    try:
        names = table.fieldnames or []
        if missing := sorted(needed.difference(names)):
            raise InputError(f"{path}:1: expected a column {missing[0]!r} in the first line, got only {', '.join(names)}")
        number = table.line_num + 1
        for row in table:
            complete = None not in row and None not in row.values()
            yield FileRow(
                str(path),
                number,
                row if complete else RowFault(f"expected the {len(names)} columns of the first line, got another number"),
            )
            number = table.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{number}: expected {name}: {error}") from error


def _parquet(path: Path, needed: set[str]) -> Iterator[FileRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := sorted(needed.difference(names)):
                raise InputError(f"{path}: expected a column {missing[0]!r}, got only {', '.join(names)}")
            number = 1
            for batch in file.iter_batches(
                batch_size=1024, columns=[name for name in names if name in {*needed, *attribution.FIELDS}]
            ):
                for row in batch.to_pylist():
                    yield FileRow(str(path), number, row)
                    number += 1
    except pa.ArrowException as error:
        raise InputError(f"{path}: is not a readable Parquet file ({error})") from error


_FORMATS: dict[str, Callable[[Path, set[str]], Iterator[FileRow]]] = {
    ".jsonl": _json_lines,
    ".txt": _whole_text,
    ".csv": partial(_table, name="CSV", strict=True),
    ".tsv": partial(_table, name="TSV", delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet,
}


def _decoded(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode() + "\n"
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError, place: str = "") -> str:
    return f"expected UTF-8, got other bytes ({place}{error.reason}); convert it, for example with `iconv -f GB18030 -t UTF-8`"


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their "\\n"; text after the last "\\n" is a line too."""
    import zstandard

    rest: list[bytes] = []  # pieces of a line that is longer than a block
    number = 1
    try:
        for block in _blocks(path):
            first, *others = block.split(b"\n")
            rest.append(first)
            if others:
                yield b"".join(rest)
                yield from others[:-1]
                rest = [others[-1]]
                number += len(others)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise InputError(
            f"{path}:{number}: the compressed file is damaged after this line ({error}); fetch it again"
        ) from error
    if last := b"".join(rest):
        yield last


class _Decoder(Protocol):
    """The interface that zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file; EOFError if it ends too early (`zstandard.open` would not notice)."""
    import zstandard

    decoders: dict[str, Callable[[], _Decoder]] = {
        ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: gzip header, and the checksum is verified
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }
    with path.open("rb") as file:
        if path.suffix not in decoders:
            while data := file.read(READ):
                yield data
            return
        decoder = decoders[path.suffix]()
        while data := file.read(READ):
            while data:
                if decoder.eof:  # another member of the same file
                    decoder = decoders[path.suffix]()
                yield decoder.decompress(data)
                data = decoder.unused_data
        if not decoder.eof:
            raise EOFError("it ends too early")
