"""Chats for training: rows of data to token streams, and the streams packed into rows on disk.

Packing happens once, in one process and without torch; `ChatRows` then reads the result from a memory map. What a stream
looks like (which special tokens, what is learned) is the tokenizer's business, and what a row of data says is `llm.turns`'.

On disk: `ids.bin` and `learned.bin` hold all streams end to end, `index.npz` says where each begins and which of them
share a row, `statistics.json` is for the record. A stream of n tokens takes n - 1 positions: the last is only predicted.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.corpus import credit
from llm.corpus.credit import About
from llm.corpus.sources import read_rows
from llm.errors import InputError, Interrupted
from llm.packing import best_fit
from llm.rows import IGNORE, Row
from llm.tokenizer import TextTokenizer
from llm.turns import Template, TextTemplate, Turn

STATISTICS = "statistics.json"
_IDS, _LEARNED, _INDEX = "ids.bin", "learned.bin", "index.npz"
FILLED = 0.97  # share of the positions computed that should be real tokens
_BATCH = 1024  # rows that are tokenized at a time

Encoded = tuple[list[int], list[bool]]  # ids, and which of them are learned


@dataclass(frozen=True)
class Table:
    """Files of rows to learn from, and how."""

    files: tuple[Path, ...]
    template: Template
    weight: float = 1.0  # passes per epoch; a fraction keeps rows by the hash of their content
    skip_bad: bool = False  # count rows that cannot be used, instead of raising


@dataclass
class Counts:
    """What became of the rows of one table."""

    rows: int = 0  # read
    bad: int = 0  # could not be used, and were skipped
    unselected: int = 0  # left out by a weight below 1
    cut_prompts: int = 0
    cut_responses: int = 0
    dropped: int = 0  # nothing to learn was left within the context
    learned_tokens: int = 0  # in one epoch, all passes
    licenses: dict[str, int] = field(default_factory=dict)  # what the rows that are learned from say, where they do
    origins: dict[str, int] = field(default_factory=dict)  # their field `source`


@dataclass(frozen=True)
class Stream:
    """A chat as tokens that fit a row."""

    messages: list[dict[str, str]]
    ids: list[int]
    learned: list[bool]  # which of `ids` are to be predicted: the assistant's text and the end of its turn
    full_length: int  # tokens before anything was cut
    cut_prompt: bool = False
    cut_response: bool = False


def fit(turns: Sequence[Turn], tokenizer: TextTokenizer, *, positions: int, encoded: Encoded | None = None) -> Stream:
    """The chat as at most `positions` + 1 tokens. `encoded` is the whole chat, where it is known already.

    Where it is longer, the texts that were substituted into what the assistant does not say lose their ends, the longest
    first, until it fits. Where the assistant's turns do not fit even alone, these texts keep half of the room together and
    the stream is cut where the row ends: it then lacks the end token, because the answer goes on.
    """
    limit = positions + 1
    ids, learned = encoded or _encode(turns, tokenizer)
    full_length = len(ids)
    if full_length <= limit:
        return Stream([turn.message for turn in turns], ids, learned, full_length)
    texts = [text for turn in turns for text in turn.substituted()]
    tokens = tokenizer.encode_batch(texts)
    alone = len(_encode(_refilled(turns, [""] * len(texts)), tokenizer)[0])  # of what may not be cut
    room = limit - alone if alone <= limit else limit // 2
    while True:
        cap = _largest_cap([len(spelled) for spelled in tokens], total=room)
        cut = [_head(text, spelled, cap, tokenizer) for text, spelled in zip(texts, tokens, strict=True)]
        shortened = _refilled(turns, cut)
        ids, learned = _encode(shortened, tokenizer)
        excess = len(ids) - limit
        if excess <= 0 or alone > limit or room == 0:
            break
        room = max(0, room - excess)  # the cut has moved the borders between tokens
    return Stream(
        [turn.message for turn in shortened],
        ids[:limit],
        learned[:limit],
        full_length,
        cut_prompt=cut != texts,
        cut_response=excess > 0,
    )


def _encode(turns: Sequence[Turn], tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    return tokenizer.encode_chat([turn.message for turn in turns])


def _refilled(turns: Sequence[Turn], texts: Sequence[str]) -> list[Turn]:
    remaining = iter(texts)
    return [turn.with_substituted(remaining) for turn in turns]


def _largest_cap(lengths: Sequence[int], *, total: int) -> int:
    """The largest n for which lengths cut to n sum to at most `total`."""
    left, kept = total, len(lengths)
    for length in sorted(lengths):
        if length * kept > left:
            return left // kept
        left -= length
        kept -= 1
    return max(lengths, default=0)


def _head(text: str, tokens: Sequence[int], count: int, tokenizer: TextTokenizer) -> str:
    """The beginning of `text` that the first `count` of its tokens spell, without a character that they spell only in part."""
    if len(tokens) <= count:
        return text
    head = tokenizer.decode(tokens[:count])
    while not text.startswith(head):
        head = head[:-1]
    return head


class TurnsOfRow(NamedTuple):
    """What became of one row of data."""

    place: str  # file:line
    turns: list[Turn] | InputError  # for a row that cannot be used, the error that says why, with the place
    about: About


def read_turns(files: Sequence[Path], template: Template | TextTemplate) -> Iterator[TurnsOfRow]:
    """The rows of `files` as turns, in order."""
    for row in read_rows(files, template.fields):
        about = About()
        turns: list[Turn] | InputError
        try:
            fields = row.fields()
            about = credit.about(fields)
            turns = template.turns(fields)
        except InputError as error:
            turns = InputError(f"{row.at}: {error}")
        yield TurnsOfRow(row.at, turns, about)


def write_rows(
    folder: Path,
    tables: Sequence[Table],
    *,
    tokenizer: TextTokenizer,
    context: int,
    longest_row: int | None = None,  # default: context
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Pack `tables` under `folder`, which is complete once it exists; returns statistics.

    A chat has at most `context` positions. So has a row, unless too little of it would be real tokens: then rows are twice
    as long, and again, up to `longest_row`. Chats of a row do not see each other, so length costs only time in attention.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = [Counts() for _ in tables]
    passes: list[int] = []  # of each stream
    lengths: list[int] = []  # of each stream, in tokens
    full_lengths: list[int] = []  # before anything was cut
    with (temporary / _IDS).open("wb") as ids, (temporary / _LEARNED).open("wb") as learned:
        for table, count in zip(tables, counts, strict=True):
            for batch in _batches(_chosen(table, count)):
                report(done=sum(count.rows for count in counts), unit="rows")
                if should_stop():
                    raise Interrupted("stopped while rows were packed")
                for stream, times in _fitted(batch, table, count, tokenizer=tokenizer, positions=context):
                    full_lengths.append(stream.full_length)
                    passes.append(times)
                    lengths.append(len(stream.ids))
                    ids.write(np.array(stream.ids, dtype=np.int32).tobytes())
                    learned.write(np.array(stream.learned, dtype=np.bool_).tobytes())
    numbers = [name for name, value in asdict(Counts()).items() if isinstance(value, int)]
    totals = {name: sum(getattr(count, name) for count in counts) for name in numbers}
    if not lengths:
        names = ", ".join(sorted({str(file) for table in tables for file in table.files}))
        raise InputError(f"{names}: wants rows to learn from; found none: {json.dumps(totals)}")
    row_lengths = [context]
    while 2 * row_lengths[-1] <= (longest_row or context):
        row_lengths.append(2 * row_lengths[-1])
    statistics = (
        totals
        | _write_index(temporary, np.array(lengths), np.array(passes), row_lengths=row_lengths, padding=tokenizer.padding)
        | {"stream_tokens": _percentiles(full_lengths), "tables": [asdict(count) for count in counts]}
    )
    (temporary / STATISTICS).write_text(json.dumps(statistics, indent=2), encoding="utf-8")
    temporary.rename(folder)
    return statistics


class _Chosen(NamedTuple):
    place: str
    turns: Sequence[Turn]
    about: About
    passes: int


def _chosen(table: Table, count: Counts) -> Iterator[_Chosen]:
    """The usable rows of a table that its weight selects."""
    for place, turns, about in read_turns(table.files, table.template):
        count.rows += 1
        if isinstance(turns, InputError):
            if not table.skip_bad:
                raise turns
            count.bad += 1
        elif times := _passes(turns, table.weight):
            yield _Chosen(place, turns, about, times)
        else:
            count.unselected += 1


def _batches(rows: Iterator[_Chosen]) -> Iterator[list[_Chosen]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _fitted(
    batch: Sequence[_Chosen], table: Table, count: Counts, *, tokenizer: TextTokenizer, positions: int
) -> Iterator[tuple[Stream, int]]:
    """(stream, passes) of the rows of a batch of which something can be learned."""
    for row, encoded in zip(batch, _encoded(batch, tokenizer), strict=True):
        if isinstance(encoded, InputError):
            if not table.skip_bad:
                raise InputError(f"{row.place}: {encoded}") from encoded
            count.bad += 1
            continue
        stream = fit(row.turns, tokenizer, positions=positions, encoded=encoded)
        count.cut_prompts += stream.cut_prompt
        count.cut_responses += stream.cut_response
        if learned := sum(stream.learned[1:]):  # the first token is never predicted
            count.learned_tokens += learned * row.passes
            credit.count(count.licenses, row.about.license)
            credit.count(count.origins, row.about.origin)
            yield stream, row.passes
        else:
            count.dropped += 1


def _encoded(batch: Sequence[_Chosen], tokenizer: TextTokenizer) -> list[Encoded] | list[Encoded | InputError]:
    """All chats of a batch at once, on all cores; where one is refused, each alone, with the error in its place."""
    chats = [[turn.message for turn in row.turns] for row in batch]
    try:
        return tokenizer.encode_chats(chats)
    except InputError:
        return [_encoded_or_refused(chat, tokenizer) for chat in chats]


def _encoded_or_refused(chat: list[dict[str, str]], tokenizer: TextTokenizer) -> Encoded | InputError:
    try:
        return tokenizer.encode_chat(chat)
    except InputError as error:
        return error


def _passes(turns: Sequence[Turn], weight: float) -> int:
    """How often an epoch sees these turns; what a fraction leaves out depends on their text alone."""
    if weight % 1 == 0:
        return int(weight)
    text = json.dumps([[turn.role, turn.content] for turn in turns])
    share = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
    return int(weight) + (share < weight % 1)


def _write_index(
    folder: Path, lengths: NDArray[np.int64], passes: NDArray[np.int64], *, row_lengths: Sequence[int], padding: int
) -> dict[str, Any]:
    """Decide which streams share a row, and of which length: the first that is filled enough, else the last.

    Streams are shuffled first, so that rows mix the tables whatever their order.
    """
    streams = np.repeat(np.arange(len(lengths)), passes)
    streams = np.random.default_rng(0).permutation(streams)
    positions = lengths[streams] - 1
    for row_length in row_lengths:
        rows = best_fit(positions, capacity=row_length)
        real_share = float(positions.sum()) / (len(rows) * row_length)
        if real_share >= FILLED:
            break
    np.savez(
        folder / _INDEX,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        members=streams[np.concatenate(rows)],
        rows=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        row_length=row_length,
        padding=padding,
    )
    return {
        "chats": len(streams),
        "packed_rows": len(rows),
        "row_length": row_length,
        "tokens": int(positions.sum()),
        "real_share": round(real_share, 4),
    }


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99], method="lower").tolist()
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": max(lengths)}


class ChatRows:
    """Packed chats as a RowSource: rows in an order drawn from (seed, epoch), or as packed where `seed` is None."""

    def __init__(self, folder: Path, *, seed: int | None) -> None:
        index = np.load(folder / _INDEX)
        self.context = int(index["row_length"])
        self._padding = int(index["padding"])
        self._starts, self._members, self._rows = index["starts"], index["members"], index["rows"]
        self._ids: NDArray[np.int32] = np.memmap(folder / _IDS, dtype=np.int32, mode="r")
        self._learned: NDArray[np.bool_] = np.memmap(folder / _LEARNED, dtype=np.bool_, mode="r")
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch asked for last

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every chat has been seen as often as its weight says."""
        return len(self._rows) - 1

    def row(self, index: int) -> Row:
        """Row `index`, counted on through epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        packed = int(self._order_of(epoch)[place])
        tokens = np.full(self.context, self._padding, dtype=np.int64)
        targets = np.full(self.context, IGNORE, dtype=np.int64)
        documents = np.full(self.context, -1, dtype=np.int32)
        filled = 0
        for document, stream in enumerate(self._members[self._rows[packed] : self._rows[packed + 1]]):
            start, stop = int(self._starts[stream]), int(self._starts[stream + 1])
            end = filled + stop - start - 1
            ids = self._ids[start:stop]
            tokens[filled:end] = ids[:-1]
            targets[filled:end] = np.where(self._learned[start + 1 : stop], ids[1:], IGNORE)
            documents[filled:end] = document
            filled = end
        return Row(tokens, targets, documents)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if self._seed is None:
            return np.arange(self.rows_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self.rows_per_epoch))
        return self._order[1]
