"""Token streams packed into rows on disk, and read back as a `RowSource`. `llm.data.chat_dataset` makes the streams.

`ids.bin` and `loss_mask.bin` hold all streams end to end; `starts.bin` says where each begins, and `members.bin` which of them
share a row. A stream of n tokens takes n - 1 positions: the last token is only a target. Streams may form groups, such as the
two answers of a preference, which are documents 2i and 2i + 1 of one row. `reference.bin`, if it exists, holds the
log-probability that a reference model gives each target. All files are mapped: neither writing nor reading needs memory for
each stream.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from llm.data.batch import IGNORE, PackedRow
from llm.data.permutation import RowOrder
from llm.files import whole_file

STATISTICS = "statistics.json"
FILLED = 0.97  # share of the positions that should be real tokens
PACKED_AT_ONCE = 2**18  # streams; packing them takes about 60 MiB
_ABOUT, _IDS, _LOSS_MASK, _REFERENCE = "about.json", "ids.bin", "loss_mask.bin", "reference.bin"
_STARTS = "starts.bin"  # int64: the first token of each stream, and the end of the last one
_MEMBERS = "members.bin"  # int64: the streams of all rows, end to end
_ROWS = "rows.bin"  # int64: the first member of each row, and the end of the last one
_SOURCES, _WEIGHTS = "sources.bin", "weights.bin"  # int32 and float32, of each group
_LENGTHS, _FULL_LENGTHS, _PASSES, _LABELS = "lengths.tmp", "full_lengths.tmp", "passes.tmp", "labels.tmp"
_COLUMNS = (_LENGTHS, _FULL_LENGTHS, _PASSES, _LABELS)  # int32; needed only until the rows are packed
_ENDS = "ends.tmp"

T = TypeVar("T", bound=np.generic)


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


class Streams(NamedTuple):
    """Groups of streams, end to end."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]  # in tokens, of each stream
    full_lengths: NDArray[np.int32]  # before anything was cut
    passes: NDArray[np.int32]  # how often an epoch sees it, of each group; all groups have equally many streams
    weights: NDArray[np.float32]  # how often each target of a group counts in the loss


class StreamWriter:
    """Writes streams into an empty folder. It keeps none of them in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = {name: (folder / name).open("wb") for name in (_IDS, _LOSS_MASK, _SOURCES, _WEIGHTS, *_COLUMNS)}
        self._streams = self._groups = 0

    def append(self, ids: Sequence[int], loss_mask: Sequence[bool], *, full_length: int) -> None:
        """Add one stream, which had `full_length` tokens before anything was cut."""
        self._write(_IDS, ids)
        self._write(_LOSS_MASK, loss_mask, np.bool_)
        self._write(_LENGTHS, [len(ids)])
        self._write(_FULL_LENGTHS, [full_length])
        self._streams += 1

    def end_group(self, passes: int, *, source: int = 0, weight: float = 1.0) -> None:
        """Make a group of the streams since the last one; all groups have equal size. An epoch sees it `passes` times, and
        each of its targets counts `weight` times in the loss.
        """
        self._write(_PASSES, [passes])
        self._write(_SOURCES, [source])
        self._write(_LABELS, [0])
        self._write(_WEIGHTS, [weight], np.float32)
        self._groups += 1

    def extend(self, streams: Streams, *, source: int, labels: NDArray[np.int64] | None = None) -> None:
        """Add many groups, with the number of the label of each."""
        self._write(_IDS, streams.ids)
        self._write(_LOSS_MASK, streams.loss_mask, np.bool_)
        self._write(_LENGTHS, streams.lengths)
        self._write(_FULL_LENGTHS, streams.full_lengths)
        self._write(_PASSES, streams.passes)
        self._write(_SOURCES, np.full(len(streams.passes), source))
        self._write(_LABELS, np.zeros(len(streams.passes)) if labels is None else labels)
        self._write(_WEIGHTS, streams.weights, np.float32)
        self._streams += len(streams.lengths)
        self._groups += len(streams.passes)

    def _write(self, name: str, values: Sequence[float] | NDArray[Any], dtype: type[np.generic] = np.int32) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=dtype).data)

    def scale_weights(self, factors: Sequence[float]) -> None:
        """Multiply the weight of each group by the factor of its label."""
        for name in (_WEIGHTS, _LABELS):
            self._files[name].flush()
        weights = np.memmap(self._folder / _WEIGHTS, dtype=np.float32, mode="r+")
        labels, by_label = _mapped(self._folder / _LABELS, np.int32), np.array(factors)
        for start in range(0, len(weights), PACKED_AT_ONCE):
            part = slice(start, start + PACKED_AT_ONCE)
            weights[part] = weights[part] * by_label[labels[part]]

    def __len__(self) -> int:
        """Number of streams."""
        return self._streams

    def _lengths(self) -> NDArray[np.int32]:
        """Tokens of each stream, (groups, streams of a group)."""
        if not (file := self._files[_LENGTHS]).closed:
            file.flush()
        return _mapped(self._folder / _LENGTHS, np.int32).reshape(self._groups, -1)

    @property
    def longest_group(self) -> int:
        """Positions of the longest group, which a row has to hold."""
        return max(int((piece - 1).sum(1).max()) for piece in _pieces(self._lengths()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def pack(self, *, row_lengths: Sequence[int], padding: int) -> dict[str, Any]:
        """Write which groups share a row; rows have the first of `row_lengths` that is filled enough, else the fullest one.

        Groups are shuffled first, so that rows mix the tables; of many, an even part after the other is packed by itself, so
        that memory does not grow with their number. Returns statistics.
        """
        for file in self._files.values():
            file.close()
        lengths, ends = self._lengths(), self._ends()
        size, total = lengths.shape[1], int(ends[-1])
        parts = -(-total // PACKED_AT_ONCE)
        row_length = tokens = members = rows = 0
        with (self._folder / _MEMBERS).open("wb") as members_file, (self._folder / _ROWS).open("wb") as rows_file:
            rows_file.write(np.int64(0).tobytes())
            for part in range(parts):
                groups = np.searchsorted(ends, np.arange(part, total, parts), side="right")
                groups = np.random.default_rng(part).permutation(groups)
                positions = (lengths[groups] - 1).sum(1, dtype=np.int64)
                row_length = row_length or _row_length(positions, row_lengths)
                packed = best_fit(positions, capacity=row_length)
                in_rows = groups[np.concatenate(packed)][:, None] * size + np.arange(size)
                ends_of_rows = members + size * np.cumsum([len(row) for row in packed])
                members_file.write(in_rows.astype(np.int64).data)
                rows_file.write(ends_of_rows.astype(np.int64).data)
                tokens, rows, members = tokens + int(positions.sum()), rows + len(packed), int(ends_of_rows[-1])
        self._write_starts(lengths)
        about: dict[str, Any] = {"row_length": row_length, "padding": padding, "streams_of_a_group": size}
        about["has_weights"] = any(bool((piece != 1).any()) for piece in _pieces(_mapped(self._folder / _WEIGHTS, np.float32)))
        (self._folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        of_streams = _distribution(_mapped(self._folder / _FULL_LENGTHS, np.int32))
        for name in (*_COLUMNS, _ENDS):
            (self._folder / name).unlink()
        return {
            "chats": total,
            "packed_rows": rows,
            "row_length": row_length,
            "tokens": tokens,
            "real_share": round(tokens / (rows * row_length), 4),
            "stream_tokens": of_streams,
        }

    def _ends(self) -> NDArray[np.int64]:
        """How often an epoch has seen a group when it has seen the groups up to this one."""
        with (self._folder / _ENDS).open("wb") as file:
            seen = 0
            for piece in _pieces(_mapped(self._folder / _PASSES, np.int32)):
                ends = seen + np.cumsum(piece, dtype=np.int64)
                file.write(ends.data)
                seen = int(ends[-1])
        return _mapped(self._folder / _ENDS, np.int64)

    def _write_starts(self, lengths: NDArray[np.int32]) -> None:
        with (self._folder / _STARTS).open("wb") as file:
            start = np.int64(0)
            for piece in _pieces(lengths.ravel()):
                starts = np.append(start, start + np.cumsum(piece, dtype=np.int64))
                file.write(starts[:-1].data)
                start = starts[-1]
            file.write(start.tobytes())


def _row_length(positions: NDArray[np.int64], row_lengths: Sequence[int]) -> int:
    """The first length whose rows are filled enough, else the one whose rows are filled most."""
    shares: dict[int, float] = {}
    for length in row_lengths:
        shares[length] = float(positions.sum()) / (len(best_fit(positions, capacity=length)) * length)
        if shares[length] >= FILLED:
            break
    return max(shares, key=lambda length: (shares[length], -length))


def _distribution(lengths: NDArray[np.int32]) -> dict[str, int]:
    """The 50th and the 95th percentile, and the most."""
    counts: Counter[int] = Counter()
    for piece in _pieces(lengths):
        values, times = np.unique(piece, return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    ordered = sorted(counts)
    below = np.cumsum([counts[length] for length in ordered])
    p50, p95 = (ordered[int(np.searchsorted(below, int((len(lengths) - 1) * share), side="right"))] for share in (0.5, 0.95))
    return {"p50": p50, "p95": p95, "max": ordered[-1]}


def _mapped(path: Path, dtype: type[T]) -> NDArray[T]:
    return np.memmap(path, dtype=dtype, mode="r")


def _pieces(values: NDArray[T]) -> Iterator[NDArray[T]]:
    """The values, a bounded number at a time."""
    for start in range(0, len(values), PACKED_AT_ONCE):
        yield np.asarray(values[start : start + PACKED_AT_ONCE])


class PackedRows:
    """Packed streams as a `RowSource`: rows in an order drawn from (seed, epoch), or as packed if `seed` is None.

    As packed, rows say which source, or table, each target is of; all targets then count alike, whatever their weights.
    """

    def __init__(self, folder: Path, *, seed: int | None) -> None:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self.context: int = about["row_length"]
        self._folder = folder
        self._padding: int = about["padding"]
        self._streams_of_a_group: int = about["streams_of_a_group"]
        self._starts, self._members, self._rows = (_mapped(folder / name, np.int64) for name in (_STARTS, _MEMBERS, _ROWS))
        self._sources = _mapped(folder / _SOURCES, np.int32) if seed is None else None  # of each group
        has_weights = seed is not None and about["has_weights"]
        self._weights = _mapped(folder / _WEIGHTS, np.float32) if has_weights else None  # of each group
        self._ids, self._loss_mask = _mapped(folder / _IDS, np.int32), _mapped(folder / _LOSS_MASK, np.bool_)
        self._reference = _mapped(folder / _REFERENCE, np.float32) if has_reference(folder) else None
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
                sources[filled:end] = self._sources[stream // self._streams_of_a_group]
            if weights is not None and self._weights is not None:
                weights[filled:end] = np.where(loss_mask, self._weights[stream // self._streams_of_a_group], 0)
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
