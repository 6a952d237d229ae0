"""What files of rows hold: fields, types, lengths, values, duplicates, languages, hints of personal data, and unusable rows.

Everything is counted in one pass. Memory grows by the hash of each row, and by no more than a few values of each field.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.text.documents import language_by_script
from llm.text.personal import PersonalData
from llm.text.readers import AS_FOUND, GUESSED, FileFormat, field_names, format_of, read_rows
from llm.text.readers.rows import FileRow
from llm.text.readers.streams import text_encoding

MOST_VALUES = 200  # distinct ones of a field that are counted
LONGEST_VALUE = 80  # characters of a value that may be a class
LANGUAGE_ROWS = 2000
EXAMPLES = 3  # rows that are shown
FIELD_LIMIT = 500  # fields that are described


@dataclass
class Faults:
    """Why rows cannot be used: for each reason the number of rows and the place and message of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, place: str, error: InputError) -> None:
        """Count a row."""
        reason = str(error).partition(", got ")[0].partition(" (")[0]
        self.counts[reason] += 1
        self.first.setdefault(reason, (place, str(error)))

    def as_json(self) -> list[dict[str, Any]]:
        """The most frequent reason first."""
        return [
            {"rows": count, "first": self.first[reason][0], "message": self.first[reason][1]}
            for reason, count in self.counts.most_common()
        ]


@dataclass
class Lengths:
    """Lengths of texts: exact quantiles, since lengths repeat."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, length: int) -> None:
        """Count a text."""
        self.counts[length] += 1

    def quantile(self, share: float) -> int:
        """The smallest length that at least `share` of the texts do not exceed; 0 if there are none."""
        wanted, seen = math.ceil(share * self.counts.total()), 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= wanted:
                return length
        return 0

    def over(self, limit: int) -> int:
        """Texts that are longer than `limit`."""
        return sum(count for length, count in self.counts.items() if length > limit)

    def as_json(self) -> dict[str, int]:
        """Half of the texts, 95% of them, and the longest."""
        return {"p50": self.quantile(0.5), "p95": self.quantile(0.95), "max": max(self.counts, default=0)}


@dataclass
class FieldProfile:
    """One field of all rows."""

    present: int = 0
    null: int = 0  # also NaN, by which tables mean that there is nothing
    empty: int = 0  # only white space
    types: Counter[str] = field(default_factory=Counter)  # of values that are there, in the words of JSON
    lengths: Lengths = field(default_factory=Lengths)  # characters of text and numbers
    values: Counter[str] | None = field(default_factory=Counter)  # None: too many or too long to be classes

    def add(self, value: Any) -> None:
        """Count a value."""
        self.present += 1
        kind = json_type(value)
        if kind == "null":
            self.null += 1
            return
        self.types[kind] += 1
        if kind in ("a list", "an object"):
            self.values = None
            return
        try:
            text = str(value)
        except ValueError:  # of more digits than Python writes
            self.values = None
            return
        self.lengths.add(len(text))
        if not text.strip():
            self.empty += 1
        elif self.values is not None:
            self.values[text] += 1
            if len(text) > LONGEST_VALUE or len(self.values) > MOST_VALUES:
                self.values = None

    def as_json(self) -> dict[str, Any]:
        """Everything, with the values only if they may be classes."""
        return {
            "present": self.present,
            "null": self.null,
            "empty": self.empty,
            "types": dict(self.types.most_common()),
            "characters": self.lengths.as_json(),
            "values": None if self.values is None else dict(self.values.most_common()),
        }


@dataclass
class Profile:
    """What is known of files that are used together."""

    files: list[Path]
    encodings: dict[str, str] = field(default_factory=dict)  # by name of a text file that is not UTF-8
    formats: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    fields: dict[str, FieldProfile] = field(default_factory=dict)
    duplicates: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    personal: PersonalData = field(default_factory=PersonalData)
    faults: Faults = field(default_factory=Faults)
    examples: list[dict[str, Any]] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)  # tokens of a row's text, if they were counted

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "files": [str(path) for path in self.files],
            "formats": dict(self.formats),
            "encodings": self.encodings,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "fields": {name: one.as_json() for name, one in self.fields.items()},
            "languages": dict(self.languages.most_common()),
            "personal_data": self.personal.as_json(),
            "faults": self.faults.as_json(),
            **({"tokens": self.lengths.as_json()} if self.lengths.counts else {}),
        }


def profile(
    files: Iterable[Path],
    form: FileFormat = AS_FOUND,
    *,
    most_rows: int | None = None,
    tokens: Callable[[list[str]], list[int]] | None = None,  # numbers of tokens of texts
) -> Profile:
    """Read `files` to their end, or `most_rows` of them. A file that cannot be read at all is a fault of its own."""
    found = Profile(list(files))
    seen: set[bytes] = set()
    waiting: list[str] = []
    for row in _rows(found, form):
        if found.rows == most_rows:
            break
        found.rows += 1
        try:
            fields = row.fields()
        except InputError as error:
            found.faults.add(row.at, error)
            continue
        _add(found, row, fields, seen)
        if tokens:
            waiting.append("\n".join(text for text in fields.values() if isinstance(text, str)))
            waiting = _counted(found.lengths, waiting, tokens, least=1000)
    if tokens:
        _counted(found.lengths, waiting, tokens, least=1)
    return found


def _rows(found: Profile, form: FileFormat) -> Iterator[FileRow]:
    """The rows of all files; of Parquet files with all columns."""
    for path in found.files:
        try:
            suffix = format_of(path)
            found.formats[suffix] += 1
            if suffix in GUESSED and form.encoding is None and (encoding := text_encoding(path)) != "utf-8":
                found.encodings[path.name] = encoding
            needed = set(field_names(path, form)) if suffix == ".parquet" else set()
            yield from read_rows([path], needed, form)
        except (InputError, OSError) as error:
            found.faults.add(str(path), InputError(str(error).removeprefix(f"{path}: ")))


def _add(found: Profile, row: FileRow, fields: Mapping[str, Any], seen: set[bytes]) -> None:
    digest = blake2b(repr(list(fields.items())).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    found.duplicates += digest in seen
    seen.add(digest)
    if len(found.examples) < EXAMPLES:
        found.examples.append(dict(fields))
    longest = ""
    for name, value in fields.items():
        if name not in found.fields and len(found.fields) >= FIELD_LIMIT:
            continue
        found.fields.setdefault(name, FieldProfile()).add(value)
        for text in _texts(value):
            found.personal.add(text, name, row.at)
            longest = max(longest, text, key=len)
    if longest and found.languages.total() < LANGUAGE_ROWS:
        found.languages[_language(longest)] += 1


def _language(text: str) -> str:
    """The code of its language by its n-grams (Lui and Baldwin 2012); `other` where there are hardly any letters."""
    import py3langid  # 0.3 s

    return py3langid.classify(text)[0] if language_by_script(text) != "other" else "other"


def _texts(value: Any) -> Iterator[str]:
    """The texts inside a value, such as those of messages."""
    match value:
        case str():
            yield value
        case Mapping():
            for part in value.values():
                yield from _texts(part)
        case list() | tuple():
            for part in value:
                yield from _texts(part)


def _counted(lengths: Lengths, texts: list[str], tokens: Callable[[list[str]], list[int]], *, least: int) -> list[str]:
    if len(texts) < least:
        return texts
    for count in tokens(texts):
        lengths.add(count)
    return []


def json_type(value: object) -> str:
    """The type of a value in the words of JSON; NaN counts as null."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "null" if value != value else "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
    return type(value).__name__
