"""Makes training rows from files of chats: read, select by weight, tokenize, cut to the context, and pack.

It runs once, in one process without torch; memory grows by a few bytes per row. `llm.data.conversations` makes turns from
rows, the tokenizer makes tokens and the loss mask from turns, and `llm.data.packing` packs them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.data.class_weights import ClassWeights, class_factors
from llm.data.conversations import PreferenceTemplate, Template, TextTemplate
from llm.data.packing import STATISTICS, StreamWriter
from llm.data.truncation import Long, Stream, fit, fit_all, windows
from llm.data.turn import Turn
from llm.errors import InputError, Interrupted
from llm.files import whole_folder
from llm.text.attribution import Attribution, count_value
from llm.text.readers import encoding_notes, read_rows
from llm.text.selection import hash_share, in_batches, passes
from llm.tokenizer.messages import Chat
from llm.tokenizer.tokenizer import ChatPart, TextTokenizer

_BATCH = 1024  # rows tokenized at a time
MANY_CUT = 0.05  # share of the rows above which a cut is a warning
SHORTEST_ROW = 64  # positions


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


class TurnsOfRow(NamedTuple):
    """One row of data as turns."""

    place: str  # file:line
    turns: list[Turn] | InputError  # for a row that cannot be used, the error, with the place
    attribution: Attribution
    labels: tuple[str, ...] = ()  # what the last turn may be: several, of rows with several labels


def read_turns(files: Sequence[Path], template: Template | TextTemplate) -> Iterator[TurnsOfRow]:
    """The rows of `files` as turns, in order."""
    for place, chats, attribution in read_chats(files, template):
        if not isinstance(chats, InputError):  # the last answer is scored, whatever its weight in a training
            turns, labels = [*chats[0][:-1], chats[0][-1].learned(True)], tuple(turns[-1].content for turns in chats)
            yield TurnsOfRow(place, turns, attribution, labels)
        else:
            yield TurnsOfRow(place, chats, attribution)


class ChatsOfRow(NamedTuple):
    """One row of data as chats: one, or the two of a preference."""

    place: str
    chats: list[list[Turn]] | InputError
    attribution: Attribution


def read_chats(files: Sequence[Path], template: Template | TextTemplate | PreferenceTemplate) -> Iterator[ChatsOfRow]:
    """The rows of `files` as chats, in order."""
    for row in read_rows(files, template.columns, template.form):
        attribution = Attribution()
        chats: list[list[Turn]] | InputError
        try:
            fields = row.fields()
            attribution = Attribution.of(fields)
            chats = template.chats(fields)
        except InputError as error:
            chats = InputError(f"{row.at}: {error}")
        yield ChatsOfRow(row.at, chats, attribution)


def write_rows(
    folder: Path,
    tables: Sequence[Table],
    *,
    tokenizer: TextTokenizer,
    context: int,
    follow_lengths: bool = False,  # whether rows are as short as the longest chat allows
    longest_row: int | None = None,  # default: the length of a row's chats
    row_length: int | None = None,  # default: the first length that fills rows
    class_weights: ClassWeights | None = None,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Pack `tables` into `folder`, which is complete once it exists; returns statistics.

    A chat has at most `context` positions, and so has a row (twice as many if chats come in pairs); with `follow_lengths` only
    as many as the longest chat needs, rounded up to a power of two. Where too few positions would be real tokens, the length
    is doubled, up to `longest_row`. Chats of a row do not see each other, so longer rows cost only memory. The targets of a
    chat count as often as `class_weights` says of its last answer.
    """
    counts = [Counts() for _ in tables]
    answers: list[tuple[str, float]] = []  # of each group, with how often it counts for its label
    with whole_folder(folder) as temporary, StreamWriter(temporary) as writer:
        for number, (table, count) in enumerate(zip(tables, counts, strict=True)):
            for note in encoding_notes(table.files, table.template.form):
                report(note=note)
            for batch in in_batches(_selected(table, count), _BATCH):
                report(done=sum(count.rows for count in counts), unit="rows")
                if should_stop():
                    raise Interrupted("stopped while packing rows")
                for found in _fitted(batch, table, count, tokenizer=tokenizer, positions=context):
                    for streams in found.groups:
                        for stream in streams:
                            writer.append(stream.ids, stream.loss_mask, full_length=stream.full_length)
                        writer.end_group(found.passes, source=number, weight=found.weight)
                        if class_weights:
                            answers.append((found.answer, found.weight * found.passes / len(found.groups)))
        numbers = [name for name, value in asdict(Counts()).items() if isinstance(value, int)]
        totals = {name: sum(getattr(count, name) for count in counts) for name in numbers}
        if not len(writer):
            names = ", ".join(sorted({str(file) for table in tables for file in table.files}))
            raise InputError(
                f"{names}: expected rows to train on, got none: {json.dumps(totals)}; `run inspect` shows why each is left out"
            )
        if class_weights:
            factors = class_factors(answers, class_weights)
            writer.scale_weights([factors[answer] for answer, _ in answers])
        row_lengths = [row_length or context * (2 if isinstance(tables[0].template, PreferenceTemplate) else 1)]
        if follow_lengths:
            row_lengths = [min(row_lengths[0], max(SHORTEST_ROW, 1 << (writer.longest_group - 1).bit_length()))]
        while row_length is None and 2 * row_lengths[-1] <= (longest_row or 0):
            row_lengths.append(2 * row_lengths[-1])
        packed = writer.pack(row_lengths=row_lengths, padding=tokenizer.padding)
        statistics = totals | packed | {"tables": [asdict(count) for count in counts]}
        if cut := cut_sentence(totals, context):
            statistics["cut"] = cut
            report(note=cut)
        (temporary / STATISTICS).write_text(json.dumps(statistics, indent=2), encoding="utf-8")
    return statistics


def cut_sentence(counts: Mapping[str, int], context: int) -> str | None:
    """What the user should know of rows that were cut, if any were: how many, by how much, and what helps against many."""
    used = counts["rows"] - counts["bad"] - counts["unselected"]
    if not counts["truncated"]:
        return None
    share = counts["truncated"] / used
    told = (
        f"{counts['truncated']:,} of {used:,} rows ({100 * share:.3g}%) are longer than {context:,} positions and were cut, "
        f"by {counts['cut_tokens']:,} of {counts['full_tokens']:,} tokens"
    )
    if share <= MANY_CUT:
        return told
    return f'warning: {told}; a larger `context` keeps more of them, and so does long = "window" of documents to classify'


class _SelectedRow(NamedTuple):
    place: str
    chats: list[list[Turn]]
    attribution: Attribution
    passes: int


def _selected(table: Table, count: Counts) -> Iterator[_SelectedRow]:
    """The usable rows of a table that its weight selects."""
    for place, chats, attribution in read_chats(table.files, table.template):
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
