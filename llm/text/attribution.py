"""What a row says of itself (licence, origin, language), for credit and for statistics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

FIELDS = ("license", "source", "language")  # are kept of a row where they are there, whatever else is read
DISTINCT = 1000  # values that are counted one by one; the rest is OTHERS
OTHERS = "(others)"


class About(NamedTuple):
    """The values of FIELDS, where they are texts."""

    license: str | None = None
    origin: str | None = None  # its field `source`
    language: str | None = None


def about(fields: Mapping[str, Any]) -> About:
    """What `fields` say."""
    return About(*(_told(fields.get(name)) for name in FIELDS))


def _told(value: object) -> str | None:
    """A text; what UTF-8 cannot hold names nothing, and would stop whoever writes it down later."""
    return value if isinstance(value, str) and value == value.encode(errors="ignore").decode() else None


def count(counts: dict[str, int], value: str | None, rows: int = 1) -> None:
    """Add `rows` rows that say `value`, unless they say nothing."""
    if value is not None and rows:
        name = value if value in counts or len(counts) < DISTINCT else OTHERS
        counts[name] = counts.get(name, 0) + rows
