"""The licence, origin and language that a row names, kept for credit and for statistics."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

FIELDS = ("license", "source", "language")  # fields of a row that are always read if they exist
DISTINCT = 1000  # values that are counted one by one; the rest is OTHERS
OTHERS = "(others)"


class Attribution(NamedTuple):
    """The values of FIELDS in a row; None where a value is missing or is not text."""

    license: str | None = None
    origin: str | None = None  # the field `source`
    language: str | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """The attribution of a row with these fields."""
        return cls(*(_text(fields.get(name)) for name in FIELDS))


def _text(value: object) -> str | None:
    """The value if it is text that UTF-8 can hold, so that it can be written to the record."""
    return value if isinstance(value, str) and value == value.encode(errors="ignore").decode() else None


def count_value(counts: dict[str, int], value: str | None, rows: int = 1) -> None:
    """Add `rows` rows to the count of `value`, unless it is None."""
    if value is not None and rows:
        name = value if value in counts or len(counts) < DISTINCT else OTHERS
        counts[name] = counts.get(name, 0) + rows
