"""Chats for training: rows of data to token streams that fit a model, packed into rows by `llm.data.packing`.

That happens once, in one process and without torch, and takes no more memory for more rows but for a few bytes each. What a
stream looks like (which special tokens, what is learned) is the tokenizer's business, and what a row of data says is
`llm.data.conversations`'.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llm.data.conversations import PreferenceTemplate, Template, TextTemplate, Turn
from llm.data.packing import STATISTICS, StreamWriter
from llm.data.truncation import Encoded, Stream, fit_all
from llm.errors import InputError, Interrupted
from llm.files import whole_folder
from llm.text import attribution
from llm.text.attribution import Attribution
from llm.text.readers import read_rows
from llm.text.selection import hash_share, in_batches, passes
from llm.tokenizer.tokenizer import TextTokenizer

_BATCH = 1024  # rows that are tokenized at a time


@dataclass(frozen=True)
class Table:
    """Files of rows to learn from, and how."""

    files: tuple[Path, ...]
    template: Template | PreferenceTemplate  # of all tables of a training the same
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
    truncated: int = 0  # rows of which either was cut
    dropped: int = 0  # nothing to learn was left within the context
    learned_tokens: int = 0  # in one epoch, all passes
    licenses: dict[str, int] = field(default_factory=dict)  # what the rows that are learned from say, where they do
    origins: dict[str, int] = field(default_factory=dict)  # their field `source`


class TurnsOfRow(NamedTuple):
    """What became of one row of data."""

    place: str  # file:line
    turns: list[Turn] | InputError  # for a row that cannot be used, the error that says why, with the place
    about: Attribution


def read_turns(files: Sequence[Path], template: Template | TextTemplate) -> Iterator[TurnsOfRow]:
    """The rows of `files` as turns, in order."""
    for place, chats, about in read_chats(files, template):
        yield TurnsOfRow(place, chats if isinstance(chats, InputError) else chats[0], about)


class ChatsOfRow(NamedTuple):
    """The same with all chats of a row: one, or two of a preference."""

    place: str
    chats: list[list[Turn]] | InputError
    about: Attribution


def read_chats(files: Sequence[Path], template: Template | TextTemplate | PreferenceTemplate) -> Iterator[ChatsOfRow]:
    """The rows of `files` as chats, in order."""
    for row in read_rows(files, template.fields):
        about = Attribution()
        chats: list[list[Turn]] | InputError
        try:
            fields = row.fields()
            about = Attribution.of(fields)
            chats = template.chats(fields)
        except InputError as error:
            chats = InputError(f"{row.at}: {error}")
        yield ChatsOfRow(row.at, chats, about)


def write_rows(
    folder: Path,
    tables: Sequence[Table],
    *,
    tokenizer: TextTokenizer,
    context: int,
    longest_row: int | None = None,  # default: as long as a row's chats may be
    row_length: int | None = None,  # default: what fills rows
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Pack `tables` under `folder`, which is complete once it exists; returns statistics.

    A chat has at most `context` positions. So has a row (twice as many where chats come in pairs), unless too little of it
    would be real tokens: then rows are twice as long, and again, up to `longest_row`. Chats of a row do not see each other, so
    length costs only time in attention.
    """
    counts = [Counts() for _ in tables]
    with whole_folder(folder) as temporary, StreamWriter(temporary) as writer:
        for table, count in zip(tables, counts, strict=True):
            for batch in in_batches(_chosen(table, count), _BATCH):
                report(done=sum(count.rows for count in counts), unit="rows")
                if should_stop():
                    raise Interrupted("stopped while rows were packed")
                for streams, passes in _fitted(batch, table, count, tokenizer=tokenizer, positions=context):
                    for stream in streams:
                        writer.append(stream.ids, stream.loss_mask, full_length=stream.full_length)
                    writer.end_group(passes)
        numbers = [name for name, value in asdict(Counts()).items() if isinstance(value, int)]
        totals = {name: sum(getattr(count, name) for count in counts) for name in numbers}
        if not len(writer):
            names = ", ".join(sorted({str(file) for table in tables for file in table.files}))
            raise InputError(f"{names}: expected rows to learn from, got none: {json.dumps(totals)}")
        row_lengths = [row_length or context * (2 if isinstance(tables[0].template, PreferenceTemplate) else 1)]
        while row_length is None and 2 * row_lengths[-1] <= (longest_row or 0):
            row_lengths.append(2 * row_lengths[-1])
        packed = writer.pack(row_lengths=row_lengths, padding=tokenizer.padding)
        statistics = totals | packed | {"tables": [asdict(count) for count in counts]}
        (temporary / STATISTICS).write_text(json.dumps(statistics, indent=2), encoding="utf-8")
    return statistics


class _Chosen(NamedTuple):
    place: str
    chats: list[list[Turn]]
    about: Attribution
    passes: int


def _chosen(table: Table, count: Counts) -> Iterator[_Chosen]:
    """The usable rows of a table that its weight selects."""
    for place, chats, about in read_chats(table.files, table.template):
        count.rows += 1
        if isinstance(chats, InputError):
            if not table.skip_bad:
                raise chats
            count.bad += 1
        elif times := _passes(chats, table.weight):
            yield _Chosen(place, chats, about, times)
        else:
            count.unselected += 1


def _fitted(
    batch: Sequence[_Chosen], table: Table, count: Counts, *, tokenizer: TextTokenizer, positions: int
) -> Iterator[tuple[list[Stream], int]]:
    """(streams, passes) of the rows of a batch of which something can be learned."""
    for row, encoded in zip(batch, _encoded(batch, tokenizer), strict=True):
        if isinstance(encoded, InputError):
            if not table.skip_bad:
                raise InputError(f"{row.place}: {encoded}") from encoded
            count.bad += 1
            continue
        streams = fit_all(row.chats, encoded, tokenizer, positions=positions)
        count.cut_prompts += any(stream.cut_prompt for stream in streams)
        count.cut_responses += any(stream.cut_response for stream in streams)
        count.truncated += any(stream.cut_prompt or stream.cut_response for stream in streams)
        targets = [sum(stream.loss_mask[1:]) for stream in streams]  # the first token is never predicted
        if all(targets):
            count.learned_tokens += sum(targets) * row.passes
            attribution.count(count.licenses, row.about.license)
            attribution.count(count.origins, row.about.origin)
            yield streams, row.passes
        else:
            count.dropped += 1


def _encoded(batch: Sequence[_Chosen], tokenizer: TextTokenizer) -> list[list[Encoded] | InputError]:
    """All chats of a batch at once, on all cores; where one is refused, each row alone, with the error in its place."""
    rows = [[[turn.message for turn in turns] for turns in row.chats] for row in batch]
    try:
        encoded = iter(tokenizer.encode_chats([chat for chats in rows for chat in chats]))
        return [[next(encoded) for _ in chats] for chats in rows]
    except InputError:
        return [_encoded_or_refused(chats, tokenizer) for chats in rows]


def _encoded_or_refused(chats: list[list[dict[str, str]]], tokenizer: TextTokenizer) -> list[Encoded] | InputError:
    try:
        return [tokenizer.encode_chat(chat) for chat in chats]
    except InputError as error:
        return error


def _passes(chats: Sequence[Sequence[Turn]], weight: float) -> int:
    """How often an epoch sees these chats; what a fraction leaves out depends on their text alone."""
    if weight % 1 == 0:
        return int(weight)
    text = json.dumps([[turn.role, turn.content] for turns in chats for turn in turns])
    return passes(weight, hash_share(text))
