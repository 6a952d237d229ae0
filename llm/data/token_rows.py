"""Rows of a model's context from a folder of token shards.

Letters: N documents in a row, T tokens in a row.
"""

from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from llm.data.batch import IGNORE, PackedRow
from llm.data.document_order import DocumentOrder, ShuffledDocuments, SortedDocuments
from llm.data.permutation import RowOrder
from llm.data.token_shards import TokenShards

EPOCHS = 2  # whose orders are kept: a step may span the end of an epoch


class TokenRows:
    """A `RowSource` of `context` tokens a row (by default the context of the folder) from a folder of shards.

    With a seed, epoch e has each document as often as its `passes`, in an order drawn from (seed, e), end to end and cut into
    full rows; the tokens after the last full row are left out. The rows come in an order of their own: in that of the text, a
    document longer than a step would fill whole steps alone; `in_order` leaves them so. Without a seed, as for validation,
    each document comes once, sorted by source and length, the last row is padded, and rows say of which source each token is
    and how much text it stands for.
    """

    def __init__(self, folder: Path, *, seed: int | None, context: int | None = None, in_order: bool = False) -> None:
        self.shards = TokenShards(folder)
        self.context = context = context or self.shards.context
        self.sources = self.shards.sources
        self._seed = seed
        if seed is None:
            self.tokens_per_epoch = self.shards.tokens
            self.rows_per_epoch = -(-self.tokens_per_epoch // context)
        else:
            self.tokens_per_epoch = self.shards.epoch_tokens
            self.rows_per_epoch = max(self.tokens_per_epoch // context, min(self.tokens_per_epoch, 1))
        self._row_order = RowOrder(self.rows_per_epoch, seed=None if in_order else seed)
        self._lock = Lock()  # several threads read rows, and an order takes seconds and memory to make
        self._orders: OrderedDict[int, DocumentOrder] = OrderedDict()

    def row(self, index: int) -> PackedRow:
        """Row `index`, counted through all epochs."""
        epoch, place = self._row_order(index)
        first = place * self.context  # first token of the row, counted over the epoch
        last = min(first + self.context, self.tokens_per_epoch)
        count = last - first
        found = self._order(0 if self._seed is None else epoch).covering(first, last)
        begin, end = np.searchsorted(found.ends, [first, last - 1], side="right")
        here = slice(begin, end + 1)
        documents, shards, ends = found.documents[here], found.shards[here], found.ends[here]
        lengths = documents["tokens"].astype(np.int64)  # (N,)
        starts = ends - lengths
        pieces = np.minimum(ends, last) - np.maximum(starts, first)  # (N,) tokens of each in this row
        which = np.repeat(np.arange(len(documents), dtype=np.int32), pieces)

        # One token more than the row has: the target of its last position, unless a document ends there.
        wanted = pieces.copy()
        wanted[-1] += int(ends[-1] > last)
        places = documents["start"] + np.maximum(first - starts, 0)
        read = [self.shards.read(*piece) for piece in zip(shards.tolist(), places.tolist(), wanted.tolist(), strict=True)]
        ids = np.concatenate(read)

        tokens = np.full(self.context, self.shards.padding, dtype=np.int64)
        tokens[:count] = ids[:count]
        targets = np.full(self.context, IGNORE, dtype=np.int64)
        targets[: len(ids) - 1] = ids[1:]
        targets[np.cumsum(pieces)[:-1] - 1] = IGNORE  # no target crosses into the next document
        if self._seed is not None:
            return PackedRow(tokens, targets, self._filled(which, -1))
        text_bytes = (documents["bytes"] / lengths)[which].astype(np.float32)
        return PackedRow(
            tokens,
            targets,
            self._filled(which, -1),
            sources=self._filled(documents["source"].astype(np.int32)[which], 0),
            text_bytes=np.append(text_bytes, np.zeros(self.context - count, np.float32)),
        )

    def _filled(self, values: NDArray[np.int32], padding: int) -> NDArray[np.int32]:
        return np.append(values, np.full(self.context - len(values), padding, np.int32))

    def _order(self, epoch: int) -> DocumentOrder:
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) >= EPOCHS:
                    self._orders.popitem(last=False)
                self._orders[epoch] = self._order_of(epoch)
            self._orders.move_to_end(epoch)
            return self._orders[epoch]

    def _order_of(self, epoch: int) -> DocumentOrder:
        return SortedDocuments(self.shards) if self._seed is None else ShuffledDocuments(self.shards, (self._seed, epoch))
