"""Tokenized documents on disk: written once shard by shard, then read through memory maps.

A folder holds `shard-00000.bin` and so on, the ids of whole documents end to end, and beside each a `.npy` table with one row
per document (tokens, passes, bytes of text). A shard with a table is complete, so after a kill the writer continues after the
last one; `meta.json` is written last, when all shards are complete. `TokenRows` makes rows of a model's context from such a
folder. Ids are uint16 if the vocabulary fits, else uint32.

Letters: D documents, T tokens in a row.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llm.data.batch import IGNORE, PackedRow
from llm.data.permutation import RowOrder
from llm.files import whole_file, write_text

META = "meta.json"
SHARD_TOKENS = 2**26  # 128 MiB of uint16: few files for a large corpus, little to repeat after a crash
DOCUMENT = np.dtype([("tokens", "<u4"), ("passes", "<u4"), ("bytes", "<u8")])  # one row of a shard's table


class TokenWriter:
    """Writes documents into shards. After a stop, a new writer continues after its first `documents` documents."""

    def __init__(self, folder: Path, *, vocab_size: int, context: int, padding: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._about: dict[str, Any] = {"vocab_size": vocab_size, "context": context, "padding": padding}
        self._shard_tokens = shard_tokens
        tables = [np.load(path) for path in _tables(folder)]
        self._shards = len(tables)
        self.documents = sum(len(table) for table in tables)  # in complete shards
        self.tokens = sum(int(table["tokens"].sum()) for table in tables)
        self.bytes = sum(int(table["bytes"].sum()) for table in tables)
        self._table: list[tuple[int, int, int]] = []
        self._tokens_in_shard = 0
        self._open_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, ids: Sequence[int], *, passes: int, text_bytes: int) -> None:
        """Add one document. A shard ends before a document that does not fit into it."""
        if self._table and self._tokens_in_shard + len(ids) > self._shard_tokens:
            self._close_shard()
            self._open_shard()
        self._file.write(np.array(ids, dtype=self._dtype).data)
        self._table.append((len(ids), passes, text_bytes))
        self._tokens_in_shard += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += text_bytes

    def finish(self) -> dict[str, Any]:
        """Close the last shard and write `meta.json`, which makes the folder complete; returns its content."""
        if self._table:
            self._close_shard()
        else:
            self._file.close()
            self._shard_path().unlink()
        totals = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": self._shards}
        meta = self._about | {"dtype": self._dtype.name} | totals
        write_text(self._folder / META, json.dumps(meta, indent=2) + "\n")
        return meta

    def _shard_path(self) -> Path:
        return self._folder / f"shard-{self._shards:05}.bin"

    def _open_shard(self) -> None:
        self._file = self._shard_path().open("wb", buffering=2**20)

    def _close_shard(self) -> None:
        self._file.close()
        with whole_file(self._shard_path().with_suffix(".npy")) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(self._table, dtype=DOCUMENT))
        self._shards += 1
        self._table = []
        self._tokens_in_shard = 0


class TokenShards:
    """The documents of a complete folder."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / META).read_text())
        self.vocab_size: int = meta["vocab_size"]
        self.context: int = meta["context"]  # tokens in a row, by default
        self.padding: int = meta["padding"]  # id of the padding token
        self.tokens: int = meta["tokens"]
        self.bytes: int = meta["bytes"]  # of text, over all documents
        tables = [np.load(path) for path in _tables(folder)]
        table = np.concatenate([np.empty(0, DOCUMENT), *tables])
        self.lengths: NDArray[np.int64] = table["tokens"].astype(np.int64)  # (D,) tokens of each document
        self.passes: NDArray[np.int64] = table["passes"].astype(np.int64)  # (D,) how often an epoch sees each
        self.text_bytes: NDArray[np.int64] = table["bytes"].astype(np.int64)  # (D,)
        # (D,) index of the first token, over all shards
        self.starts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        self._shard_ends = np.cumsum([int(table["tokens"].sum()) for table in tables], dtype=np.int64)
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self._shards = [np.memmap(path.with_suffix(".bin"), dtype=dtype, mode="r") for path in _tables(folder)]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def document(self, index: int) -> NDArray[np.int64]:
        """The ids of one document."""
        first = self.starts[index]
        return self.gather(np.arange(first, first + self.lengths[index]))

    def gather(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `places`, which count over all shards."""
        shards = np.searchsorted(self._shard_ends, places, side="right")
        tokens = np.empty(len(places), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            before = self._shard_ends[shard - 1] if shard else 0
            tokens[here] = self._shards[shard][places[here] - before]
        return tokens


class TokenRows:
    """A `RowSource` of `context` tokens a row (by default the context of the folder) from a folder of shards.

    With a seed, epoch e has each document as often as its `passes`, in an order drawn from (seed, e), end to end and cut into
    full rows; the tokens after the last full row are left out. The rows come in an order of their own: in that of the text, a
    document longer than a step would fill whole steps alone. Without a seed, as for validation, each document comes once, in the
    order of the folder, and the last row is padded.
    """

    def __init__(self, folder: Path, *, seed: int | None, context: int | None = None) -> None:
        self.shards = TokenShards(folder)
        self.context = context = context or self.shards.context
        self._seed = seed
        if seed is None:
            self.tokens_per_epoch = self.shards.tokens
            self.rows_per_epoch = -(-self.tokens_per_epoch // context)
        else:
            self.tokens_per_epoch = int(self.shards.lengths @ self.shards.passes)
            self.rows_per_epoch = max(self.tokens_per_epoch // context, min(self.tokens_per_epoch, 1))
        self._row_order = RowOrder(self.rows_per_epoch, seed=seed)
        self._order = lru_cache(maxsize=2)(self._draw_order)  # 2: a step may span the end of an epoch

    def row(self, index: int) -> PackedRow:
        """Row `index`, counted through all epochs."""
        epoch, place = self._row_order(index)
        order, ends = self._order(0 if self._seed is None else epoch)
        first = place * self.context  # first token of the row, counted over the epoch
        last = min(first + self.context, self.tokens_per_epoch)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        documents = order[begin : end + 1]
        document_ends = ends[begin : end + 1]
        document_starts = document_ends - self.shards.lengths[documents]
        pieces = np.minimum(document_ends, last) - np.maximum(document_starts, first)  # tokens of each in this row
        which = np.repeat(np.arange(len(documents), dtype=np.int32), pieces)

        # One token more than the row has: the target of its last position, unless a document ends there.
        shift = self.shards.starts[documents] - document_starts  # from an index in the epoch to one in the shards
        places = np.arange(first, last) + shift[which]
        goes_on = document_ends[-1] > last
        found = self.shards.gather(np.append(places, places[-1] + 1) if goes_on else places)
        count = last - first

        tokens = np.full(self.context, self.shards.padding, dtype=np.int64)
        tokens[:count] = found[:count]
        targets = np.full(self.context, IGNORE, dtype=np.int64)
        targets[: len(found) - 1] = found[1:]
        targets[np.cumsum(pieces)[:-1] - 1] = IGNORE  # no target crosses into the next document
        numbers = np.full(self.context, -1, dtype=np.int32)
        numbers[:count] = which
        return PackedRow(tokens, targets, numbers)

    def _draw_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch in order, and the end of each in tokens of the epoch."""
        order: NDArray[np.int64] = np.arange(len(self.shards))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(np.repeat(order, self.shards.passes))
        return order, np.cumsum(self.shards.lengths[order])


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npy"))
