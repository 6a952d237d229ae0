"""Tables: CSV with any separator, TSV, Parquet, and sheets of Excel and LibreOffice. The first row of a text or sheet names
the fields.
"""

import csv
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Self

from llm.errors import InputError
from llm.text import attribution
from llm.text.readers.office import check_archive
from llm.text.readers.rows import FileRow, RowFault, not_utf8
from llm.text.readers.streams import LONGEST_LINE, lines
from llm.text.readers.workbook_process import read_apart

DELIMITERS = ",;\t|"
SNIFFED_ROWS, SNIFFED = 20, 1 << 20  # lines, and characters
WIDEST_FIELD = 2**31 - 1  # the default of 131,072 characters is less than a chapter; LONGEST_LINE is for whole rows
READ_BYTES = 1 << 20  # of a column of a Parquet file
MOST_ROWS, BATCH_BYTES, MOST_BYTES = 1024, 16 << 20, 64 << 20  # of a Parquet file, at once; the last for any dictionary


def read_csv(path: Path, needed: set[str], *, encoding: str, delimiter: str | None) -> Iterator[FileRow]:
    """The rows of a CSV file; without a `delimiter`, the one of `, ; tab |` that gives the first rows the most columns."""
    first = next(_Lines(path, encoding), "")
    told = first[4:5] if first.startswith("sep=") and len(first.strip()) == 5 else None  # a line that Excel writes
    found = delimiter or told or _sniffed(_Lines(path, encoding))
    rows = _Lines(path, encoding)
    if told:
        next(rows)
    table = csv.reader(rows, delimiter=found, strict=True)
    yield from _table(path, table, needed, rows, name="CSV", skipped=int(bool(told)))


def read_tsv(path: Path, needed: set[str], *, encoding: str) -> Iterator[FileRow]:
    """The rows of a TSV file, in which a quotation mark is an ordinary character."""
    rows = _Lines(path, encoding)
    table = csv.reader(rows, delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _table(path, table, needed, rows, name="TSV")


def read_sheet(path: Path, needed: set[str], *, sheet: str | None) -> Iterator[FileRow]:
    """The rows of a sheet of an .xlsx, .xls or .ods file, by default the first one."""
    if find_spec("python_calamine") is None:
        raise InputError(f"{path}: expected the package python-calamine, got none; pip install 'stockpot[office]'")
    check_archive(path)
    rows = read_apart(path, sheet)
    head = next(rows, None)
    if head is None:
        return
    columns = _columns(path, [str(cell) for cell in head], needed)
    for number, row in enumerate(rows, start=2):
        if any(cell != "" for cell in row):
            yield FileRow(str(path), number, {name: value for name, value in zip(columns, row, strict=True) if name})


def read_parquet(path: Path, needed: set[str] | None, *, row_group: int | None = None) -> Iterator[FileRow]:
    """The rows of a Parquet file, or of a group of them; only the columns `needed` and those of `llm.text.attribution` are
    read, or all for None.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=READ_BYTES) as file:  # pages of a column as they are needed, not all at once
            names = file.schema_arrow.names
            _check_columns(path, names, needed or set())
            columns = [name for name in names if needed is None or name in {*needed, *attribution.FIELDS}]
            groups = range(file.num_row_groups) if row_group is None else [row_group]
            number = 1 + sum(file.metadata.row_group(before).num_rows for before in range(row_group or 0))
            for group in groups:
                rows = _rows_at_once(file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
                    for content in _contents(batch):
                        yield FileRow(str(path), number, content)
                        number += 1
    except MemoryError as error:
        raise InputError(
            f"{path}: expected a table whose pages fit into memory, got larger ones ({error}); write it with smaller row "
            "groups"
        ) from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: is not a readable Parquet file ({error})") from error


def _rows_at_once(group: Any) -> int:
    """How many rows of a row group are in memory at once: about BATCH_BYTES of them. A value that a dictionary has once, and
    many rows mean, is written out in each row.
    """
    mean = group.total_byte_size / max(group.num_rows, 1)
    columns = [group.column(number) for number in range(group.num_columns)]
    largest = max((column.total_uncompressed_size for column in columns if column.has_dictionary_page), default=0)
    return max(1, min(MOST_ROWS, int(BATCH_BYTES / max(mean, 1)), int(MOST_BYTES / max(largest, 1))))


def _contents(batch: Any) -> Sequence[dict[str, Any] | RowFault]:
    """The rows of a batch of Arrow; a row with a string that is not UTF-8, which some writers let pass, is a fault."""
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
        return found
    except UnicodeDecodeError:
        return [_content(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _content(row: Any) -> dict[str, Any] | RowFault:
    try:
        (fields,) = row.to_pylist()
        return dict(fields)
    except UnicodeDecodeError as error:
        return RowFault(not_utf8(error))


class _Lines:
    """The lines of a table as text, which go into rows of a bounded length; those that are not UTF-8 are in `faults`."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.faults: dict[int, RowFault] = {}  # by number of the line
        self._lines = enumerate(lines(path, encoding), start=1)
        self._row = 0  # characters

    def begin_row(self) -> None:
        """The next line begins a row."""
        self._row = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next line; csv.Error if its row is too long, as with a quotation mark that nothing closes."""
        if self._row > LONGEST_LINE:
            raise csv.Error(
                f"expected a row of at most {LONGEST_LINE:,} characters, got a longer one, or a quote without its end"
            )
        number, line = next(self._lines)
        try:
            text = line.decode() + "\n"
        except UnicodeDecodeError as error:
            self.faults[number] = RowFault(not_utf8(error))
            text = line.decode(errors="replace") + "\n"
        self._row += len(text)
        return text


def _sniffed(table: Iterator[str]) -> str:
    """The delimiter by which the first lines have the most columns in the row that has the fewest."""
    rows: list[str] = []
    for line in islice(table, SNIFFED_ROWS):
        rows.append(line)
        if sum(map(len, rows)) > SNIFFED:
            break
    columns = {delimiter: _fewest_columns(rows, delimiter) for delimiter in DELIMITERS}
    return max(columns, key=lambda delimiter: columns[delimiter])


def _fewest_columns(rows: Sequence[str], delimiter: str) -> int:
    try:
        found = [len(row) for row in csv.reader(rows, delimiter=delimiter) if row]
    except csv.Error:
        return 0
    return min(found[:-1] or found, default=0)  # the last one may go on behind the sample


def _table(path: Path, table: Any, needed: set[str], read: _Lines, *, name: str, skipped: int = 0) -> Iterator[FileRow]:
    """The rows below the one that names the columns. What is wrong in a row, also bytes and quotes, is its own fault."""
    csv.field_size_limit(WIDEST_FIELD)
    try:
        names: list[str] = next((row for row in table if row), [])
    except csv.Error as error:
        raise InputError(f"{path}:{skipped + table.line_num}: expected {name}: {error}") from error
    columns = _columns(path, names, needed)
    while True:
        number = skipped + table.line_num + 1
        read.begin_row()
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield FileRow(str(path), number, RowFault(f"expected {name}: {error}"))
            continue
        faults = read.faults
        broken = [faults[line] for line in range(number, skipped + table.line_num + 1) if line in faults] if faults else []
        if broken:
            yield FileRow(str(path), number, broken[0])
        elif row and len(row) == len(columns):
            yield FileRow(str(path), number, {name: cell for name, cell in zip(columns, row, strict=True) if name})
        elif row:
            yield FileRow(
                str(path), number, RowFault(f"expected the {len(columns)} columns of the first line, got {len(row)}")
            )


def _columns(path: Path, names: Sequence[str], needed: set[str]) -> list[str]:
    """The names of columns without white space around them, checked."""
    columns = [name.strip() for name in names]
    _check_columns(path, columns, needed)
    return columns


def _check_columns(path: Path, columns: Sequence[str], needed: set[str]) -> None:
    """InputError if a column that is needed is missing or there twice."""
    for name in sorted(needed):
        if columns.count(name) != 1:
            got = f"{columns.count(name)} of that name" if name in columns else f"only {', '.join(map(repr, columns))}"
            raise InputError(f"{path}: expected one column {name!r}, got {got}")
