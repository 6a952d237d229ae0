"""The first rows of files and some of the others, for a look at data before anything is made of it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llm.text.readers import AS_FOUND, WHOLE, FileFormat, format_of, read_rows
from llm.text.readers.rows import FileRow
from llm.text.readers.streams import marked_encoding
from llm.text.selection import evenly_spaced

FIRST_ROWS = 1000  # of all files together
FEWEST_ROWS = 50  # first ones of each file
MOST_FILES = 20  # looked at, evenly spaced
EVERY = 10  # of the rows behind the first ones, one of so many
READ_ROWS = 5000  # of each file, with those that are passed over
RANDOM_LINES = 200  # anywhere in a large file of JSON lines
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
            if number >= READ_ROWS:
                self.is_whole = False
                yield from _random_lines(path, self._form)
                return
            if number < first or chance.randrange(EVERY) == 0:
                yield row
            else:
                self.is_whole = False


def _random_lines(path: Path, form: FileFormat) -> Iterator[FileRow]:
    """Lines at random places of a file of JSON lines that is neither compressed nor of another encoding, with the bytes before
    each in place of its number.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson") or form.encoding:
        return
    chance = random.Random(0)
    with path.open("rb") as file:
        if marked_encoding(file.read(4)) not in (None, "utf-8"):
            return
        for _ in range(RANDOM_LINES):
            file.seek(chance.randrange(path.stat().st_size))
            file.readline()
            place, line = file.tell(), file.readline(1 << 20)
            if line.endswith(b"\n") and not line.isspace():
                yield FileRow(f"{path}, after byte", place, line)
