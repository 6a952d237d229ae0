"""Choices among many items, by hash or by place, and batches of items. All are the same on every run."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def share_of(digest: bytes) -> float:
    """The 64 bits of a hash as a number from 0 to 1."""
    return int.from_bytes(digest, "little") / 2**64


def hash_share(text: str) -> float:
    """A number from 0 to 1 that depends only on the text and is uniform over texts."""
    return share_of(blake2b(text.encode(), digest_size=8).digest())


def passes(weight: float, share: float) -> int:
    """How often an epoch sees an item: the whole part of `weight`, and once more where its `share` is below the fraction."""
    return int(weight) + (share < weight % 1)


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items with equal gaps between them, beginning with the first; all of them if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items as lists of `size`; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
