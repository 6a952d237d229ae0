"""The rows of a table as tokens, part by part: read, select by weight, tokenize, and cut to the context.

The work on a part is a pure function that looks at no other part. Its result is one file, which is complete under its final
name; a later run with the same rows and settings reuses it. `llm.data.chat_dataset` packs the parts into rows.
"""

import hashlib
import json
import pickle
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.conversations import PreferenceTemplate, Template, TextTemplate
from llm.data.packing import Streams
from llm.data.truncation import Long, Stream, fit, fit_all, windows
from llm.data.turn import Turn
from llm.errors import InputError
from llm.files import whole_file
from llm.text.attribution import Attribution, count_value
from llm.text.readers.rows import FileRow
from llm.text.selection import hash_share, in_batches, passes
from llm.tokenizer.messages import Chat
from llm.tokenizer.tokenizer import ChatPart, TextTokenizer

_BATCH = 1024  # rows tokenized at a time

Reasoning = Literal["all", "last", "none"]


@dataclass(frozen=True)
class Table:
    """Files of rows to train on, and how to use them."""

    files: tuple[Path, ...]
    template: Template | PreferenceTemplate  # of the same type in all tables of a training
    weight: float = 1.0  # passes per epoch; a fraction selects rows by the hash of their content
    skip_bad: bool = False  # count rows that cannot be used instead of raising
    reasoning: Reasoning = "all"  # of which answers it is learned
    long: Long = "cut"  # what to do with a row that is too long


@dataclass
class Counts:
    """Counts of the rows of one table."""

    rows: int = 0  # read
    bad: int = 0  # cannot be used, and were skipped
    unselected: int = 0  # left out by a weight below 1
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_turns: int = 0  # rows that lost turns at their end
    truncated: int = 0  # rows that were cut in any of these ways
    windowed: int = 0  # rows that became several, each with a piece of the text
    cut_tokens: int = 0
    full_tokens: int = 0  # of the rows before they were cut
    dropped: int = 0  # no target was left within the context
    learned_tokens: int = 0  # targets in one epoch, all passes
    licenses: dict[str, int] = field(default_factory=dict)  # rows used, by their field `license`
    origins: dict[str, int] = field(default_factory=dict)  # rows used, by their field `source`

    def add(self, other: "Counts") -> None:
        """Add the counts of other rows of the table."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            else:
                for credited, rows in value.items():
                    count_value(getattr(self, name), credited, rows)


class ChatsOfRow(NamedTuple):
    """One row of data as chats: one, or the two of a preference."""

    place: str
    chats: list[list[Turn]] | InputError
    attribution: Attribution


def chats_of_row(row: FileRow, template: Template | TextTemplate | PreferenceTemplate) -> ChatsOfRow:
    """A row as it was read as chats."""
    attribution = Attribution()
    chats: list[list[Turn]] | InputError
    try:
        fields = row.fields()
        attribution = Attribution.of(fields)
        chats = template.chats(fields)
    except InputError as error:
        chats = InputError(f"{row.at}: {error}")
    return ChatsOfRow(row.at, chats, attribution)


class Part(NamedTuple):
    """Consecutive rows of one table: the unit of work."""

    number: int  # through all tables
    table: int
    rows: list[FileRow]


class TokenizedPart(NamedTuple):
    """The result of one part, in a file."""

    table: int
    counts: Counts
    path: Path

    def streams(self) -> Streams:
        """Its chats as tokens."""
        with np.load(self.path) as file:
            return Streams(*(file[name] for name in Streams._fields))

    def labels(self) -> tuple[list[str], NDArray[np.int32], NDArray[np.float64]]:
        """The last answers of its chats, which of them each group has, and for how many rows of its label it counts."""
        with np.load(self.path) as file:
            return json.loads(str(file["about"]))["labels"], file["labels"], file["shares"]


def settings_digest(tables: Sequence[Table], tokenizer: TextTokenizer, positions: int, *, with_labels: bool) -> str:
    """What decides the result of a part besides its rows, as one short text."""
    return _digest((tables, tokenizer, positions, with_labels))


def tokenize_part(
    part: Part,
    *,
    tables: Sequence[Table],
    tokenizer: TextTokenizer,
    positions: int,
    with_labels: bool,  # whether the last answers of the chats are kept
    settings: str,
    folder: Path,
) -> TokenizedPart:
    """Write the chats of `part` into `folder`, unless the result of the same rows and `settings` is there."""
    path = folder / f"{part.number:06d}.npz"
    identity = _digest((settings, part.table, part.rows))
    if (finished := _counts_of(path, identity)) is not None:
        return TokenizedPart(part.table, finished, path)
    table, counts = tables[part.table], Counts()
    ids, loss_mask, lengths, full_lengths, times = array("i"), bytearray(), array("i"), array("i"), array("i")
    weights, shares, labels, names = array("f"), array("d"), array("i"), dict[str, int]()
    for batch in in_batches(_selected(part.rows, table, counts), _BATCH):
        for row in _fitted(batch, table, counts, tokenizer=tokenizer, positions=positions):
            for stream in chain.from_iterable(row.groups):
                ids.extend(stream.ids)
                loss_mask.extend(stream.loss_mask)
                lengths.append(len(stream.ids))
                full_lengths.append(stream.full_length)
            groups = len(row.groups)
            times.extend([row.passes] * groups)
            weights.extend([row.weight] * groups)
            if with_labels:
                labels.extend([names.setdefault(row.answer, len(names))] * groups)
                shares.extend([row.weight * row.passes / groups] * groups)
    streams = Streams(
        np.array(ids, dtype=np.int32),
        np.frombuffer(loss_mask, dtype=np.bool_),
        np.array(lengths, dtype=np.int32),
        np.array(full_lengths, dtype=np.int32),
        np.array(times, dtype=np.int32),
        np.array(weights, dtype=np.float32),
    )
    about = json.dumps({"identity": identity, "counts": asdict(counts), "labels": list(names)})
    told: dict[str, Any] = {"about": np.array(about), "labels": np.array(labels, dtype=np.int32), "shares": np.array(shares)}
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **(streams._asdict() | told))
    return TokenizedPart(part.table, counts, path)


def _counts_of(path: Path, identity: str) -> Counts | None:
    """The counts of a finished part; None if there is none of this identity."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            about = json.loads(str(file["about"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Counts(**about["counts"]) if about["identity"] == identity else None


def _digest(value: object) -> str:
    return hashlib.blake2b(pickle.dumps(value), digest_size=16).hexdigest()


class _SelectedRow(NamedTuple):
    place: str
    chats: list[list[Turn]]
    attribution: Attribution
    passes: int


def _selected(rows: Iterable[FileRow], table: Table, count: Counts) -> Iterator[_SelectedRow]:
    """The usable rows that the weight of their table selects."""
    for row in rows:
        place, chats, attribution = chats_of_row(row, table.template)
        count.rows += 1
        if isinstance(chats, InputError):
            if not table.skip_bad:
                raise chats
            count.bad += 1
        elif times := _passes(chats, table.weight):
            yield _SelectedRow(place, [with_reasoning(turns, table.reasoning) for turns in chats], attribution, times)
        else:
            count.unselected += 1


def with_reasoning(turns: Sequence[Turn], of: Reasoning) -> list[Turn]:
    """The turns of a chat, in which only these answers keep the reasoning before them."""
    if of == "all":
        return list(turns)
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    return [turn if of == "last" and number == last else turn.without_reasoning() for number, turn in enumerate(turns)]


class _Fitted(NamedTuple):
    groups: list[list[Stream]]
    passes: int
    answer: str  # the last one of the chat
    weight: float  # of each target


def _fitted(
    batch: Sequence[_SelectedRow], table: Table, count: Counts, *, tokenizer: TextTokenizer, positions: int
) -> Iterator[_Fitted]:
    """Of the rows of a batch the groups of streams that have targets. Each label of a row with several is a chat of its own,
    and all of them together count as one row.
    """
    for row, encoded in zip(batch, _encoded(batch, tokenizer), strict=True):
        if isinstance(encoded, InputError):
            if not table.skip_bad:
                raise InputError(f"{row.place}: {encoded}") from encoded
            count.bad += 1
            continue
        together = isinstance(table.template, PreferenceTemplate)
        chats = (
            [(row.chats, encoded)] if together else [([chat], [parts]) for chat, parts in zip(row.chats, encoded, strict=True)]
        )
        try:
            found = [list(fitted_groups(*one, tokenizer, positions=positions, long=table.long)) for one in chats]
        except InputError as error:
            if not table.skip_bad:
                raise InputError(f"{row.place}: {error}") from error
            count.bad += 1
            continue
        count.windowed += not together and len(found[0]) > len(encoded[0])
        _count_cuts(count, [stream for groups in found for group in groups for stream in group])
        kept = [[group for group in groups if all(_targets(group))] for groups in found]
        if not any(kept):
            count.dropped += 1
            continue
        count_value(count.licenses, row.attribution.license)
        count_value(count.origins, row.attribution.origin)
        for (turns, *_), groups in zip((one[0] for one in chats), kept, strict=True):
            count.learned_tokens += sum(sum(_targets(group)) for group in groups) * row.passes
            if groups:
                yield _Fitted(groups, row.passes, turns[-1].content, 1 / len(chats))


def _count_cuts(count: Counts, streams: Sequence[Stream]) -> None:
    """Count a row whose streams these are."""
    count.cut_prompts += any(stream.cut_prompt for stream in streams)
    count.cut_responses += any(stream.cut_response for stream in streams)
    count.cut_turns += any(stream.cut_turns for stream in streams)
    count.truncated += any(stream.is_cut for stream in streams)
    count.cut_tokens += sum(stream.full_length - len(stream.ids) for stream in streams)
    count.full_tokens += sum(stream.full_length for stream in streams)


def _targets(group: Sequence[Stream]) -> list[int]:
    """The targets of each stream; its first token is never predicted."""
    return [sum(stream.loss_mask[1:]) for stream in group]


def fitted_groups(
    chats: Sequence[Sequence[Turn]],
    encoded: Sequence[list[ChatPart]],
    tokenizer: TextTokenizer,
    *,
    positions: int,
    long: Long = "cut",
) -> Iterator[list[Stream]]:
    """The chats of a row as streams: a preference's together; of a single chat, each part by itself. InputError for one
    that is too long if it is to fail.
    """
    if len(chats) > 1:  # of which the last answers alone are compared
        whole = [(parts[-1].ids, parts[-1].loss_mask) for parts in encoded]
        yield fit_all(chats, whole, tokenizer, positions=positions)
        return
    longest = max(len(part.ids) for part in encoded[0]) - 1
    if long == "fail" and longest > positions:
        raise InputError(f'expected at most {positions:,} positions, as long = "fail" asks, got {longest:,}')
    if long == "window" and longest > positions and len(encoded[0]) == 1:
        for piece in windows(chats[0], tokenizer, positions=positions):
            yield [fit(piece, tokenizer, positions=positions)]
        return
    for part in encoded[0]:
        turns = [turn.learned(number in part.answers) for number, turn in enumerate(chats[0][: part.stop])]
        yield [fit(turns, tokenizer, positions=positions, encoded=(part.ids, part.loss_mask), leave_out_turns=True)]


def _encoded(batch: Sequence[_SelectedRow], tokenizer: TextTokenizer) -> list[list[list[ChatPart]] | InputError]:
    """The parts of all chats of a batch at once, on all cores; if that is too much, chat by chat."""
    rows = [[[turn.message for turn in turns] for turns in row.chats] for row in batch]
    chats = [chat for of_row in rows for chat in of_row]
    try:
        encoded = iter(tokenizer.encode_parts(chats))
    except InputError:  # a template may need too much time or memory for one of them
        encoded = iter([_parts_or_refused(chat, tokenizer) for chat in chats])
    return [_all_or_refused([next(encoded) for _ in of_row]) for of_row in rows]


def _parts_or_refused(chat: Chat, tokenizer: TextTokenizer) -> list[ChatPart] | InputError:
    try:
        return tokenizer.encode_parts([chat])[0]
    except InputError as error:
        return error


def _all_or_refused(found: Sequence[list[ChatPart] | InputError]) -> list[list[ChatPart]] | InputError:
    refused = next((one for one in found if isinstance(one, InputError)), None)
    return refused or [one for one in found if not isinstance(one, InputError)]


def _passes(chats: Sequence[Sequence[Turn]], weight: float) -> int:
    """How often an epoch sees these chats; what a fraction leaves out depends only on their text."""
    if weight % 1 == 0:
        return int(weight)
    text = json.dumps([[turn.role, turn.content, *([turn.more] if turn.more else [])] for turns in chats for turn in turns])
    return passes(weight, hash_share(text))
