"""Reads rows from files. The format of a file is its suffix, in capitals or not:

* `.jsonl`, `.ndjson`: one JSON object a line; `.json`: an array of objects, or objects one after the other
* `.csv`, `.tsv`, `.xlsx`, `.xls`, `.ods`: the first row names the fields; in `.tsv` a quotation mark is plain text
* `.parquet`
* `.txt`, `.md`, `.docx`, `.pdf`: the whole file is one document, in the field `text`; a text of more than five million
  characters is several

Text files may also have `.gz` or `.zst`. Reading is sequential and cheap: a line of JSON is parsed by `FileRow.fields`, so
that other processes may do it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llm.errors import InputError
from llm.text.readers.json_values import read_json
from llm.text.readers.office import docx_text, pdf_text
from llm.text.readers.plain import read_text
from llm.text.readers.rows import FileRow, RowFault
from llm.text.readers.split import Split, rows_of_part
from llm.text.readers.streams import lines, text_encoding
from llm.text.readers.tables import read_csv, read_parquet, read_sheet, read_tsv

WHOLE = (".txt", ".md", ".docx", ".pdf")  # documents, not rows
TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")  # may be compressed
SUFFIXES = (*TEXT, ".xlsx", ".xls", ".ods", ".parquet", ".docx", ".pdf")
GUESSED = (".csv", ".tsv", ".txt", ".md")  # the encoding is found; JSON is UTF-8 by its standard
COMPRESSED = (".gz", ".zst")
MOST_EMPTY_LINES = 1_000_000  # one after the other


@dataclass(frozen=True)
class FileFormat:
    """How to read files where they do not tell it themselves."""

    encoding: str | None = None  # default: by a byte order mark; else UTF-8 for JSON, and found for other text
    delimiter: str | None = None  # of .csv; default: found
    sheet: str | None = None  # of workbooks; default: the first
    split: Split | None = None  # the part of the rows of all files that is read; default: all


AS_FOUND = FileFormat()


def read_rows(files: Iterable[Path], needed: set[str] | None, form: FileFormat = AS_FOUND) -> Iterator[FileRow]:
    """The rows of `files`, in order. `needed` are the fields that the caller uses: InputError for a table without one of them.
    Of a Parquet file, only these columns and those of `llm.text.attribution` are read; all if `needed` is None.
    """
    if form.split is None:
        for path in files:
            yield from _rows(path, needed, form)
        return
    paths, whole = list(files), replace(form, split=None)
    told = None if needed is None else needed | form.split.fields
    everything = (row for path in paths for row in _rows(path, _read_to_split(path, form.split, whole), whole))
    wanted = rows_of_part(everything, form.split)
    yield from (row for index, row in enumerate(read_rows(paths, told, whole)) if index in wanted)


def _read_to_split(path: Path, split: Split, form: FileFormat) -> set[str]:
    """The fields that decide the part of a row: of Parquet files, only columns that are named are read."""
    return split.fields or (set(field_names(path, form)) if format_of(path) == ".parquet" else set())


def field_names(path: Path, form: FileFormat = AS_FOUND) -> list[str]:
    """The names of the fields of a file, from its first row; InputError if there is none."""
    suffix = format_of(path)
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(pq.read_schema(path).names)
        except pa.ArrowException as error:
            raise InputError(f"{path}: is not a readable Parquet file ({error})") from error
    if suffix in WHOLE:  # `read_rows` would read it whole
        return ["text"]
    for row in read_rows([path], set(), replace(form, split=None)):
        return list(row.fields())
    raise InputError(f"{path}: expected at least one row, got none")


def format_of(path: Path) -> str:
    """The suffix that tells the format; InputError for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    found = suffixes[-1 - compressed] if len(suffixes) > compressed else ""
    if found not in SUFFIXES or (compressed and found not in TEXT):
        raise InputError(
            f"{path}: expected a file named *{', *'.join(TEXT)} (also with .gz or .zst), *{', *'.join(SUFFIXES[len(TEXT) :])}"
        )
    return found


def encoding_notes(files: Iterable[Path], form: FileFormat = AS_FOUND) -> Iterator[str]:
    """A sentence for the user about each text file whose encoding was found to be another than UTF-8."""
    for path in files if form.encoding is None else ():
        if format_of(path) in GUESSED and (found := text_encoding(path)) != "utf-8":
            yield f'{path.name}: is read as {found}; if that is wrong, name it: read = {{ encoding = "..." }}'


def _rows(path: Path, wanted: set[str] | None, form: FileFormat) -> Iterator[FileRow]:
    needed = wanted or set()
    match format_of(path):
        case ".jsonl" | ".ndjson":
            return _json_lines(path, form.encoding)
        case ".json":
            return read_json(path, form.encoding)
        case ".csv":
            return read_csv(path, needed, encoding=form.encoding or text_encoding(path), delimiter=form.delimiter)
        case ".tsv":
            return read_tsv(path, needed, encoding=form.encoding or text_encoding(path))
        case ".parquet":
            return read_parquet(path, wanted)
        case ".txt" | ".md":
            return read_text(path, form.encoding or text_encoding(path), has_headings=format_of(path) == ".md")
        case ".docx":
            return iter([_document(path, docx_text(path))])
        case ".pdf":
            return iter([_document(path, pdf_text(path))])
    return read_sheet(path, needed, sheet=form.sheet)


def _document(path: Path, text: str | RowFault) -> FileRow:
    return FileRow(str(path), 1, text if isinstance(text, RowFault) else {"text": text})


def _json_lines(path: Path, encoding: str | None) -> Iterator[FileRow]:
    place, last = str(path), 0
    for number, line in enumerate(lines(path, encoding), start=1):
        if line and not line.isspace():
            yield FileRow(place, number, line)
            last = number
        elif number - last > MOST_EMPTY_LINES:
            raise InputError(f"{path}:{number}: expected a row, got {MOST_EMPTY_LINES:,} empty lines")
