"""In which order an epoch has the documents of a folder of tokens, and which of them cover a range of its tokens.

The order of training is a permutation that is computed place by place. Beside it a sum of tokens is kept for every STRIDE
places, 0.25 bytes a document, so memory does not grow with the number of documents to speak of.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm.data.permutation import Permutation
from llm.data.token_shards import DOCUMENT, Documents, TokenShards
from llm.text.selection import in_batches

STRIDE = 32  # places that share a sum: a row reads at least as many entries of tables
CHUNK = 2**18  # documents whose places are computed at a time, so that numbers stay in a core's cache
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Stretch:
    """Consecutive documents of an epoch."""

    documents: Documents  # (N,)
    shards: NDArray[np.int64]  # (N,) of each
    ends: NDArray[np.int64]  # (N,) the end of each, in tokens of the epoch


class DocumentOrder(Protocol):
    """The documents of one epoch, in order."""

    def covering(self, first: int, last: int) -> Stretch:
        """The documents that have the tokens from `first` until `last`, counted over the epoch; a few more may surround
        them."""


class SortedDocuments:
    """Every document once, sorted by source and length: neighbouring rows are of one kind, so every n-th row has all kinds.

    It keeps the table in memory, as is right for documents that are held out.
    """

    def __init__(self, shards: TokenShards) -> None:
        tables = [shards.table(shard) for shard in range(len(shards.documents_of))]
        table = np.concatenate([np.empty(0, DOCUMENT), *tables])
        order = np.lexsort((table["tokens"], table["source"]))
        order = order[table["tokens"][order] > 0]
        of = np.repeat(np.arange(len(tables)), shards.documents_of)
        self._all = Stretch(table[order], of[order], np.cumsum(table["tokens"][order], dtype=np.int64))

    def covering(self, first: int, last: int) -> Stretch:
        """The documents that have these tokens."""
        begin, end = np.searchsorted(self._all.ends, [first, last - 1], side="right")
        found = slice(begin, end + 1)
        return Stretch(self._all.documents[found], self._all.shards[found], self._all.ends[found])


class ShuffledDocuments:
    """Every document as often as its passes, in an order drawn by a key.

    A shard whose most frequent document has m passes has m places for each of its documents, of which those beyond a
    document's own passes are empty: so a place is found without a list of all.
    """

    def __init__(self, shards: TokenShards, key: tuple[int, int]) -> None:
        self._shards = shards
        self._first_places = np.cumsum([0, *(np.array(shards.documents_of) * np.array(shards.most_passes)).tolist()])
        self._places = int(self._first_places[-1])
        self._permutation = Permutation(self._places, key)
        self._ends = np.cumsum(self._tokens_per_stride())

    def covering(self, first: int, last: int) -> Stretch:
        """The documents that have these tokens."""
        begin, end = np.searchsorted(self._ends, [first, last - 1], side="right").tolist()
        places = np.arange(begin * STRIDE, min((end + 1) * STRIDE, self._places))
        numbers = self._permutation(places)
        shards = np.searchsorted(self._first_places, numbers, side="right") - 1
        passes, inside = np.divmod(numbers - self._first_places[shards], np.array(self._shards.documents_of)[shards])
        documents, _ = self._shards.look_up(self._shards.first_documents[shards] + inside)
        real = (passes < documents["passes"]) & (documents["tokens"] > 0)
        documents, shards = documents[real], shards[real]
        before = int(self._ends[begin - 1]) if begin else 0
        return Stretch(documents, shards, before + np.cumsum(documents["tokens"], dtype=np.int64))

    def _tokens_per_stride(self) -> NDArray[np.int64]:
        """The tokens in every STRIDE places, from one pass over the tables as they lie on disk."""
        sums = np.zeros(-(-self._places // STRIDE), dtype=np.int64)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="order") as pool:
            for parts in in_batches(self._parts(), THREADS):  # not all at once: their results would fill the memory
                for strides, tokens in pool.map(lambda part: self._strides(*part), parts):
                    np.add.at(sums, strides, tokens)
        return sums

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        for shard, documents in enumerate(self._shards.documents_of):
            for first in range(0, documents, CHUNK):
                yield shard, first, min(CHUNK, documents - first)

    def _strides(self, shard: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """In which stride each pass of these documents is, and its tokens."""
        table = self._shards.table(shard, first, count)
        strides, tokens = [], []
        for passed in range(self._shards.most_passes[shard]):
            again = np.flatnonzero(table["passes"] > passed)
            numbers = self._first_places[shard] + passed * self._shards.documents_of[shard] + first + again
            strides.append(self._permutation.inverse(numbers) // STRIDE)
            tokens.append(table["tokens"][again].astype(np.int64))
        return np.concatenate(strides), np.concatenate(tokens)
