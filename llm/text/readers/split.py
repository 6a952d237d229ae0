"""Rows split into those to train on, to validate on and to test on, without files of their own.

Which part a row is in depends on the rows alone, not on their order or on the names of files: rows are sorted by hash, or by
time, and the last ones are held out. Rows of one group stay together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from llm.errors import InputError
from llm.text.readers.rows import FileRow

Part = Literal["train", "validation", "test"]
FEWEST = {"test": 3, "validation": 5}  # groups of a stratum of which one is held out, however small its share is


@dataclass(frozen=True)
class Split:
    """One part of rows, and how they are split."""

    part: Part
    validation: float = 0.1  # share of the rows
    test: float = 0.1
    stratify: str | None = None  # a field: each of its values is split by itself
    group: str | None = None  # a field: rows with the same value are in the same part; default: equal rows
    time: str | None = None  # a field: the last rows by it are held out, not those that a hash chooses

    @property
    def fields(self) -> set[str]:
        """The fields that it reads; empty if it reads all."""
        named = {self.stratify, self.group, self.time} - {None}
        return {name for name in named if name} if self.group else set()


@dataclass
class _Group:
    """Rows that stay together: the first of them says where."""

    stratum: str
    order: tuple[Any, ...]
    rows: list[int]


def rows_of_part(rows: Iterable[FileRow], split: Split) -> set[int]:
    """The indices of the rows in the part. Those that cannot be read, or have no time, are trained on, and so told."""
    groups: dict[bytes, _Group] = {}
    train: list[int] = []
    for index, row in enumerate(rows):
        try:
            fields = row.fields()
        except InputError:
            train.append(index)
            continue
        key = _hash(fields.get(split.group)) if split.group else _hash(sorted(fields.items()))
        if split.time and _order(fields.get(split.time)) is None:
            train.append(index)
            continue
        order = (_order(fields[split.time]) or (), key) if split.time else (key,)
        stratum = str(fields.get(split.stratify)) if split.stratify else ""
        group = groups.setdefault(key, _Group(stratum, order, []))
        group.rows.append(index)
        if split.time:
            group.order = max(group.order, order)
    parts: dict[Part, list[int]] = {"train": train, "validation": [], "test": []}
    strata: dict[str, list[_Group]] = {}
    for group in groups.values():
        strata.setdefault(group.stratum, []).append(group)
    for members in strata.values():
        members.sort(key=lambda group: group.order)
        tested, validated = (
            _held_out(len(members), share, name) for name, share in (("test", split.test), ("validation", split.validation))
        )
        for place, group in enumerate(members, start=1):
            left = len(members) - place
            part: Part = "test" if left < tested else "validation" if left < tested + validated else "train"
            parts[part] += group.rows
    return set(parts[split.part])


def _held_out(groups: int, share: float, part: str) -> int:
    """How many of a stratum's groups are in a part."""
    fewest = 1 if share and groups >= FEWEST[part] else 0
    return max(fewest, math.floor(groups * share + 0.5)) if groups > 1 else 0


def _hash(value: Any) -> bytes:
    return blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=8).digest()


def _order(value: Any) -> tuple[int, Any] | None:
    """What a time is compared by: numbers by value, and dates as ISO 8601 writes them as text; None for nothing."""
    match value:
        case bool() | None:
            return None
        case int() | float():
            return (0, value) if value == value else None
        case Mapping() | list():
            return None
    text = str(value).strip()
    try:
        return (0, float(text))
    except ValueError:
        return (1, text) if text else None
