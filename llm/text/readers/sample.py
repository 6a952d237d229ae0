"""The first rows of files and some of the others, for a look at data before anything is made of it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from llm.text.readers import AS_FOUND, WHOLE, FileFormat, format_of, read_rows
from llm.text.readers.rows import FileRow
from llm.text.readers.streams import marked_encoding
from llm.text.readers.tables import read_parquet
from llm.text.selection import evenly_spaced

FIRST_ROWS = 1000  # of all files together
FEWEST_ROWS = 50  # first ones of each file
MOST_FILES = 20  # looked at, evenly spaced
RANDOM_GROUPS = 20  # of a Parquet file
EVERY = 10  # of the rows behind the first ones, one of so many
READ_ROWS = 5000  # of each file, with those that are passed over
RANDOM_ROWS = 200  # anywhere in a large file that can be entered anywhere: of JSON lines, or Parquet
# Of other large files, as compressed ones, that are passed over (0.2 s for JSON lines in gz, 0.5 s for CSV), one of so many:
FURTHER_ROWS, FURTHER_EVERY = 100_000, 500
LARGEST_DOCUMENT = 1 << 22  # bytes of a file that is one document, such as a .pdf
FEW_DOCUMENTS = 5


class Sample:
    """Rows of `files` in order. `is_whole` says, once they were all taken, whether there are no others."""

    def __init__(self, files: Sequence[Path], needed: set[str] | None, form: FileFormat = AS_FOUND) -> None:
        self._needed, self._form = needed, replace(form, split=None)  # the other parts are read by other tables
        self._files = evenly_spaced(files, MOST_FILES)
        self.is_whole = len(self._files) == len(files)

    def __iter__(self) -> Iterator[FileRow]:
        """The rows; InputError for a file that cannot be read."""
        first = max(FEWEST_ROWS, FIRST_ROWS // max(1, len(self._files)))
        documents = 0
        for path in self._files:
            if format_of(path) in WHOLE:
                documents += 1
                if documents > FEW_DOCUMENTS or path.stat().st_size > LARGEST_DOCUMENT:
                    self.is_whole = False
                    continue
            yield from self._rows(path, first)

    def _rows(self, path: Path, first: int) -> Iterator[FileRow]:
        chance = random.Random(0)
        for number, row in enumerate(read_rows([path], self._needed, self._form)):
            if number == READ_ROWS and (places := _random_access(path, self._form)):
                self.is_whole = False
                yield from places(path, self._needed)
                return
            every = EVERY if number < READ_ROWS else FURTHER_EVERY
            if number < first or chance.randrange(every) == 0:
                yield row
            else:
                self.is_whole = False
            if number >= FURTHER_ROWS:
                self.is_whole = False
                return


def _random_access(path: Path, form: FileFormat) -> Callable[[Path, set[str] | None], Iterator[FileRow]] | None:
    """How to read rows at random places of a file, if it can be entered anywhere."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson") and not form.encoding:
        with path.open("rb") as file:
            return _random_lines if marked_encoding(file.read(4)) in (None, "utf-8") else None
    return _random_rows if suffix == ".parquet" else None


def _random_rows(path: Path, needed: set[str] | None) -> Iterator[FileRow]:
    """The first rows of random groups of rows of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = file.num_row_groups
        chosen = sorted(random.Random(0).sample(range(groups), min(groups, RANDOM_GROUPS)))
    for group in chosen:
        yield from islice(read_parquet(path, needed, row_group=group), RANDOM_ROWS // len(chosen))


def _random_lines(path: Path, needed: set[str] | None) -> Iterator[FileRow]:
    """Lines at random places of a file of JSON lines, with the bytes before each in place of its number."""
    chance = random.Random(0)
    with path.open("rb") as file:
        for _ in range(RANDOM_ROWS):
            file.seek(chance.randrange(path.stat().st_size))
            file.readline()
            place, line = file.tell(), file.readline(1 << 20)
            if line.endswith(b"\n") and not line.isspace():
                yield FileRow(f"{path}, after byte", place, line)
