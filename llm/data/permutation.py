"""Pseudorandom orders in constant memory: each place is computed when it is asked for, so no list of a whole epoch is kept.

A `Permutation` is a Feistel network (Luby and Rackoff 1988), which maps the numbers below a power of four onto themselves
whatever its rounds compute. Results that are not below the wanted size are sent through it again until they are (cycle
walking, Black and Rogaway 2002), which keeps it one to one.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]

ROUNDS = 6  # four are a pseudorandom permutation for a perfect round function; two more for one that is not
BLOCK = 1024  # places computed at a time: one costs nearly as much as all of them, 0.2 ms


class Permutation:
    """A one-to-one map of the numbers below `size` onto themselves, drawn by `key`."""

    def __init__(self, size: int, key: Sequence[int]) -> None:
        bits = max(1, size - 1).bit_length()
        self.size = size
        self._half = np.uint64(max(1, -(-bits // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys: Numbers = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64).astype(np.uint64)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of `numbers`, (N,), goes."""
        return self._walk(self._once, numbers)

    def inverse(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """What goes to each of `numbers`, (N,)."""
        return self._walk(self._once_back, numbers)

    def _walk(self, once: Callable[[Numbers], Numbers], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        found = once(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self.size)):
            found[outside] = once(found[outside])
        return found.astype(np.int64)

    def _once(self, numbers: Numbers) -> Numbers:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._half) | right

    def _once_back(self, numbers: Numbers) -> Numbers:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ (_mixed(left + key) & self._mask), left
        return (left << self._half) | right


def _mixed(numbers: Numbers) -> Numbers:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a change of any bit changes about half of all bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class Place(NamedTuple):
    """A row of an epoch."""

    epoch: int
    row: int


class RowOrder:
    """The order of rows: each epoch has every row once, in an order drawn from (seed, epoch), or as they lie without a
    seed."""

    def __init__(self, rows: int, *, seed: int | None) -> None:
        self._rows, self._seed = rows, seed
        self._block = lru_cache(maxsize=4)(self._draw_block)  # a step may span two blocks, and two epochs

    def __call__(self, index: int) -> Place:
        """The row at place `index`, counted through all epochs."""
        epoch, place = divmod(index, self._rows)
        if self._seed is None:
            return Place(epoch, place)
        block, offset = divmod(place, BLOCK)
        return Place(epoch, int(self._block(epoch, block)[offset]))

    def _draw_block(self, epoch: int, block: int) -> NDArray[np.int64]:
        assert self._seed is not None
        places = np.arange(block * BLOCK, min((block + 1) * BLOCK, self._rows))
        return Permutation(self._rows, (self._seed, epoch))(places)
