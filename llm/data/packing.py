"""Token streams packed into rows on disk, and read back as a `RowSource`. `llm.data.chat_dataset` makes the streams.

`ids.bin` and `loss_mask.bin` hold all streams end to end; `index.npz` says where each begins and which of them share a row. A
stream of n tokens takes n - 1 positions: the last token is only a target. Streams may form groups, such as the two answers of
a preference, which are documents 2i and 2i + 1 of one row. `reference.bin`, if it exists, holds the log-probability that a
reference model gives each target.
"""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llm.data.batch import IGNORE, PackedRow
from llm.data.permutation import RowOrder
from llm.files import whole_file

STATISTICS = "statistics.json"
FILLED = 0.97  # share of the positions that should be real tokens
_IDS, _LOSS_MASK, _INDEX, _REFERENCE = "ids.bin", "loss_mask.bin", "index.npz", "reference.bin"


def best_fit(lengths: NDArray[np.int64], *, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's lengths summing to at most `capacity`.

    Best-fit decreasing: the longest piece first, each into the row that it fills best, and a new row only if none has room.
    It needs at most 11/9 of the fewest rows possible (Johnson 1973), and few more than the sum of the lengths on texts of
    mixed length. Pieces of equal length keep their order. Every length is in 1..capacity.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left: the rows that have exactly this much
    rooms = 0  # bit n is set where open_rows[n] holds a row: the next larger room is found by one shift
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit set
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


class StreamWriter:
    """Writes streams into an empty folder. It keeps a few bytes of each in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ids = (folder / _IDS).open("wb")
        self._loss_mask = (folder / _LOSS_MASK).open("wb")
        self._lengths = array("i")  # in tokens
        self._full_lengths = array("i")  # before anything was cut
        self._passes, self._sources = array("i"), array("i")  # of each group
        self._weights = array("f")

    def append(self, ids: Sequence[int], loss_mask: Sequence[bool], *, full_length: int) -> None:
        """Add one stream."""
        self._ids.write(np.array(ids, dtype=np.int32).tobytes())
        self._loss_mask.write(np.array(loss_mask, dtype=np.bool_).tobytes())
        self._lengths.append(len(ids))
        self._full_lengths.append(full_length)

    def end_group(self, passes: int, *, source: int = 0, weight: float = 1.0) -> None:
        """Make a group of the streams since the last one; all groups have equal size. An epoch sees it `passes` times, and each
        of its targets counts `weight` times in the loss.
        """
        self._passes.append(passes)
        self._sources.append(source)
        self._weights.append(weight)

    def scale_weights(self, factors: Sequence[float]) -> None:
        """Multiply the weight of each group by its factor."""
        self._weights = array("f", (weight * factor for weight, factor in zip(self._weights, factors, strict=True)))

    def __len__(self) -> int:
        """Number of streams."""
        return len(self._lengths)

    @property
    def longest_group(self) -> int:
        """Positions of the longest group, which a row has to hold."""
        size = len(self._lengths) // len(self._passes)
        return int((np.array(self._lengths, dtype=np.int64) - 1).reshape(-1, size).sum(1).max())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._ids.close()
        self._loss_mask.close()

    def pack(self, *, row_lengths: Sequence[int], padding: int) -> dict[str, Any]:
        """Write which groups share a row; rows have the first of `row_lengths` that is filled enough, else the fullest one.

        Groups are shuffled first, so that rows mix the tables. Returns statistics.
        """
        lengths, passes = np.array(self._lengths, dtype=np.int64), np.array(self._passes, dtype=np.int64)
        size = len(lengths) // len(passes)  # of a group
        groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(passes)), passes))
        positions = (lengths - 1).reshape(-1, size).sum(1)[groups]
        real_share = 0.0
        for length in row_lengths:
            packed = best_fit(positions, capacity=length)
            share = float(positions.sum()) / (len(packed) * length)
            if share > real_share:
                rows, row_length, real_share = packed, length, share
            if share >= FILLED:
                break
        p50, p95 = np.percentile(np.frombuffer(self._full_lengths, dtype=np.int32), [50, 95], method="lower")
        members = groups[np.concatenate(rows)][:, None] * size + np.arange(size)
        np.savez(
            self._folder / _INDEX,
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            members=members.ravel(),
            rows=np.concatenate([[0], np.cumsum([len(row) for row in rows])]) * size,
            sources=np.repeat(np.array(self._sources, dtype=np.int32), size),
            row_length=row_length,
            padding=padding,
            weights=np.repeat(np.array(self._weights, dtype=np.float32), size),
        )
        return {
            "chats": len(groups),
            "packed_rows": len(rows),
            "row_length": row_length,
            "tokens": int(positions.sum()),
            "real_share": round(real_share, 4),
            "stream_tokens": {"p50": int(p50), "p95": int(p95), "max": max(self._full_lengths)},
        }


class PackedRows:
    """Packed streams as a `RowSource`: rows in an order drawn from (seed, epoch), or as packed if `seed` is None.

    As packed, the longest streams come first, and rows say which source, or table, each target is of; all targets then count
    alike, whatever their weights.
    """

    def __init__(self, folder: Path, *, seed: int | None) -> None:
        index = np.load(folder / _INDEX)
        self.context = int(index["row_length"])
        self._folder = folder
        self._padding = int(index["padding"])
        self._starts, self._members, self._rows = index["starts"], index["members"], index["rows"]
        self._sources: NDArray[np.int32] | None = index["sources"] if seed is None else None  # of each stream
        self._weights: NDArray[np.float32] | None = None  # of each stream
        if seed is not None and (index["weights"] != 1).any():
            self._weights = index["weights"]
        self._ids: NDArray[np.int32] = np.memmap(folder / _IDS, dtype=np.int32, mode="r")
        self._loss_mask: NDArray[np.bool_] = np.memmap(folder / _LOSS_MASK, dtype=np.bool_, mode="r")
        self._reference: NDArray[np.float32] | None = None
        if (folder / _REFERENCE).exists():
            self._reference = np.memmap(folder / _REFERENCE, dtype=np.float32, mode="r")
        self._row_order = RowOrder(self.rows_per_epoch, seed=seed)

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every stream has been seen as often as its passes say."""
        return len(self._rows) - 1

    def row(self, index: int) -> PackedRow:
        """Row `index`, counted through all epochs."""
        packed = self._row_order(index).row
        tokens = np.full(self.context, self._padding, dtype=np.int64)
        targets = np.full(self.context, IGNORE, dtype=np.int64)
        documents = np.full(self.context, -1, dtype=np.int32)
        reference = None if self._reference is None else np.zeros(self.context, dtype=np.float32)
        sources = None if self._sources is None else np.zeros(self.context, dtype=np.int32)
        weights = None if self._weights is None else np.zeros(self.context, dtype=np.float32)
        filled = 0
        for document, stream in enumerate(self._streams(packed)):
            start, stop = self._span(stream)
            end = filled + stop - start - 1
            ids, loss_mask = self._ids[start:stop], self._loss_mask[start + 1 : stop]
            tokens[filled:end] = ids[:-1]
            targets[filled:end] = np.where(loss_mask, ids[1:], IGNORE)
            documents[filled:end] = document
            if reference is not None and self._reference is not None:
                reference[filled:end] = np.where(loss_mask, self._reference[start + 1 : stop], 0)
            if sources is not None and self._sources is not None:
                sources[filled:end] = self._sources[stream]
            if weights is not None and self._weights is not None:
                weights[filled:end] = np.where(loss_mask, self._weights[stream], 0)
            filled = end
        return PackedRow(tokens, targets, documents, reference, sources, weights=weights)

    def write_reference(self, log_probabilities: Callable[[range], NDArray[np.float32]], *, rows_at_a_time: int) -> None:
        """Write the reference model's log-probability of each target; `log_probabilities` maps rows as packed to (B, T)."""
        with whole_file(self._folder / _REFERENCE) as temporary:
            values = np.memmap(temporary, dtype=np.float32, mode="w+", shape=self._ids.shape)
            for first in range(0, self.rows_per_epoch, rows_at_a_time):
                indices = range(first, min(first + rows_at_a_time, self.rows_per_epoch))
                for packed, found in zip(indices, log_probabilities(indices), strict=True):
                    filled = 0
                    for start, stop in map(self._span, self._streams(packed)):
                        values[start + 1 : stop] = found[filled : filled + stop - start - 1]
                        filled += stop - start - 1
            values.flush()

    def _streams(self, packed: int) -> Sequence[int]:
        """The streams that share a row, in their order."""
        streams: list[int] = self._members[self._rows[packed] : self._rows[packed + 1]].tolist()
        return streams

    def _span(self, stream: int) -> tuple[int, int]:
        """Where a stream begins and ends."""
        return int(self._starts[stream]), int(self._starts[stream + 1])


def has_reference(folder: Path) -> bool:
    """Whether `write_reference` has finished in `folder`."""
    return (folder / _REFERENCE).exists()
