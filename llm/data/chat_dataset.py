"""Makes training rows from files of chats, on all cores and without torch, in memory that does not grow with their number.

`llm.data.chat_parts` makes tokens from the rows, part by part, and `llm.data.packing` packs them. A run that was stopped or
killed goes on after the parts that it finished.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.chat_parts import (
    ChatsOfRow,
    Counts,
    Part,
    Table,
    TokenizedPart,
    chats_of_row,
    settings_digest,
    tokenize_part,
)
from llm.data.class_weights import MOST_LABELS, ClassWeights, class_factors
from llm.data.conversations import PreferenceTemplate, Template, TextTemplate
from llm.data.packing import STATISTICS, StreamWriter
from llm.data.turn import Turn
from llm.errors import InputError, Interrupted
from llm.files import whole_folder
from llm.text.attribution import Attribution
from llm.text.executor import Executor, LocalProcesses
from llm.text.readers import encoding_notes, read_rows
from llm.text.sources import rows_by_size
from llm.tokenizer.tokenizer import TextTokenizer

MANY_CUT = 0.05  # share of the rows above which a cut is a warning
SHORTEST_ROW = 64  # positions
PART_BYTES = 4 * 2**20  # of rows: some seconds of work, which a kill loses, and about 200 MiB in a process
HERE = LocalProcesses(1)


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


def read_chats(files: Sequence[Path], template: Template | TextTemplate | PreferenceTemplate) -> Iterator[ChatsOfRow]:
    """The rows of `files` as chats, in order."""
    return (chats_of_row(row, template) for row in read_rows(files, template.columns, template.form))


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
    executor: Executor = HERE,
    part_bytes: int = PART_BYTES,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Pack `tables` into `folder`, which is complete once it exists; returns statistics.

    A chat has at most `context` positions, and so has a row (twice as many if chats come in pairs); with `follow_lengths` only
    as many as the longest chat needs, rounded up to a power of two. Where too few positions would be real tokens, the length
    is doubled, up to `longest_row`. Chats of a row do not see each other, so longer rows cost only memory. The targets of a
    chat count as often as `class_weights` says of its last answer.

    Finished parts stay beside `folder` until it is complete, and are reused by the next call with the same rows and settings.
    The result depends neither on the executor nor on `part_bytes`.
    """
    parts = folder.with_name(f"{folder.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    for note in (note for table in tables for note in encoding_notes(table.files, table.template.form)):
        report(note=note)
    with_labels = class_weights is not None
    named = [replace(table, files=()) for table in tables]  # the rows come with each part
    decided: Any = {"tables": named, "tokenizer": tokenizer, "positions": context, "with_labels": with_labels}
    work = partial(tokenize_part, **decided, settings=settings_digest(**decided), folder=parts)
    counts = [Counts() for _ in tables]
    rows_of_label: dict[str, float] = {}  # with how often each counts
    with whole_folder(folder) as temporary, StreamWriter(temporary) as writer:
        for part in executor.map(work, _parts(tables, part_bytes)):
            counts[part.table].add(part.counts)
            labels = _numbered(part, rows_of_label, class_weights) if class_weights else None
            writer.extend(part.streams(), source=part.table, labels=labels)
            report(done=sum(count.rows for count in counts), unit="rows")
            if should_stop():
                raise Interrupted("stopped while packing rows")
        if not len(writer):
            raise InputError(_no_rows(tables, _totals(counts)))
        if class_weights:
            factors = class_factors(list(rows_of_label.items()), class_weights)
            writer.scale_weights([factors[label] for label in rows_of_label])
        first = row_length or context * (2 if isinstance(tables[0].template, PreferenceTemplate) else 1)
        if follow_lengths:
            first = min(first, max(SHORTEST_ROW, 1 << (writer.longest_group - 1).bit_length()))
        longest = longest_row if longest_row is not None and row_length is None else first
        packed = writer.pack(row_lengths=_doubled(first, longest), padding=tokenizer.padding)
        statistics = _totals(counts) | packed | {"tables": [asdict(count) for count in counts]}
        if cut := cut_sentence(_totals(counts), context):
            report(note=cut)
            statistics["cut"] = cut
        (temporary / STATISTICS).write_text(json.dumps(statistics, indent=2), encoding="utf-8")
    shutil.rmtree(parts)
    return statistics


def _totals(counts: Sequence[Counts]) -> dict[str, int]:
    """The sums of what is counted of each table."""
    return {name: sum(getattr(count, name) for count in counts) for name, value in vars(Counts()).items() if value == 0}


def _no_rows(tables: Sequence[Table], totals: dict[str, int]) -> str:
    names = ", ".join(sorted({str(file) for table in tables for file in table.files}))
    return f"{names}: expected rows to train on, got none: {json.dumps(totals)}; `run inspect` shows why each is left out"


def _doubled(first: int, longest: int) -> list[int]:
    """`first`, and its doubles up to `longest`."""
    lengths = [first]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    return lengths


def _numbered(part: TokenizedPart, rows_of_label: dict[str, float], weights: ClassWeights) -> NDArray[np.int64]:
    """The number of the label of each chat of a part, whose rows are added to those of their labels."""
    names, numbers, shares = part.labels()
    for number, share in zip(numbers.tolist(), shares.tolist(), strict=True):  # in order, whatever the parts: sums are rounded
        rows_of_label[names[number]] = rows_of_label.get(names[number], 0.0) + share
    if len(rows_of_label) > MOST_LABELS and weights == "balanced":
        class_factors(list(rows_of_label.items()), weights)  # tells of it before there are millions
    all_numbers = {label: number for number, label in enumerate(rows_of_label)}
    return np.array([all_numbers[name] for name in names], dtype=np.int64)[numbers]


def _parts(tables: Sequence[Table], part_bytes: int) -> Iterator[Part]:
    """The rows of all tables, in order, in parts of about `part_bytes`."""
    numbers = count()
    for number, table in enumerate(tables):
        for rows in rows_by_size(read_rows(table.files, table.template.columns, table.template.form), part_bytes):
            yield Part(next(numbers), number, rows)


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
