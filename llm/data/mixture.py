"""Mixes several sources of rows into one, each with a fixed share of the rows.

The source of a row depends only on its index, so a restart or another number of processes does not change it. After any number
of rows each source has had its share of them, to within one row.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from llm.data.batch import PackedRow, RowSource
from llm.data.chat_dataset import read_turns
from llm.data.chat_parts import Counts
from llm.data.conversations import TextTemplate
from llm.data.packing import STATISTICS
from llm.data.token_shards import SHARD_TOKENS, TokenWriter
from llm.errors import InputError, Interrupted
from llm.text.attribution import count_value
from llm.text.selection import in_batches
from llm.tokenizer.tokenizer import TextTokenizer

_BATCH = 256  # documents tokenized at a time


class MixedRows:
    """Rows of `main` with a `share` of rows of `other`; an epoch is one of `main`."""

    def __init__(self, main: RowSource, other: RowSource, *, share: float) -> None:
        assert main.context == other.context
        self._main, self._other, self._share = main, other, share
        self.context = main.context

    @property
    def rows_per_epoch(self) -> int:
        """Rows until `main` has been seen once."""
        return math.ceil(self._main.rows_per_epoch / (1 - self._share))

    def row(self, index: int) -> PackedRow:
        """Row `index`, counted through all epochs."""
        before = self._others(index)
        return self._other.row(before) if self._others(index + 1) > before else self._main.row(index - before)

    def _others(self, count: int) -> int:
        """Rows of `other` among the first `count`."""
        return math.floor(count * self._share + 0.5)


def mixed(main: RowSource, others: Sequence[tuple[RowSource, float]]) -> RowSource:
    """`main` with a share of all rows from each of `others`; the shares sum to less than 1."""
    rows, left = main, 1.0 - sum(share for _, share in others)
    for other, share in others:  # its share of the rows that are mixed so far
        rows = MixedRows(rows, other, share=share / (left + share))
        left += share
    return rows


class JoinedRows:
    """Rows that are `times` as long, each made of `times` rows of `source`."""

    def __init__(self, source: RowSource, times: int) -> None:
        self._source, self._times = source, times
        self.context = source.context * times
        self.rows_per_epoch = max(1, source.rows_per_epoch // times)

    def row(self, index: int) -> PackedRow:
        """Row `index`; the documents of its parts stay separate."""
        parts = [self._source.row(index * self._times + part) for part in range(self._times)]
        documents, count = [], 0
        for part in parts:
            documents.append(np.where(part.documents < 0, -1, part.documents + count).astype(np.int32))
            count += int(part.documents.max()) + 1
        tokens, targets = ([getattr(part, name) for part in parts] for name in ("tokens", "targets"))
        return PackedRow(np.concatenate(tokens), np.concatenate(targets), np.concatenate(documents))


def write_texts(
    folder: Path,
    files: Sequence[Path],
    template: TextTemplate,
    *,
    tokenizer: TextTokenizer,
    context: int,
    skip_bad: bool,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """Write the texts of `files` as token shards, and statistics, into `folder`, which is complete once it exists. A run that
    was killed goes on after its last complete shard, which is beside `folder` until then.
    """
    count, parts = Counts(), folder.with_name(f"{folder.name}.parts")
    about = {"vocab_size": tokenizer.vocab_size, "context": context, "padding": tokenizer.padding}
    with TokenWriter(parts, **about, shard_tokens=shard_tokens) as writer:
        remaining = _texts(files, template, count, skip_bad=skip_bad)
        deque(islice(remaining, writer.documents), maxlen=0)
        for texts in in_batches(remaining, _BATCH):
            for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
                writer.append(ids, passes=1, text_bytes=len(text.encode()))
            report(done=writer.documents, unit="texts")
            if should_stop():
                raise Interrupted("stopped while tokenizing texts")
        if not writer.tokens:
            raise InputError(f"{', '.join(map(str, files))}: expected texts to mix in, got none")
        count.learned_tokens = writer.tokens
        writer.finish()
    (parts / STATISTICS).write_text(json.dumps({"tables": [asdict(count)]}, indent=2), encoding="utf-8")
    parts.rename(folder)


def _texts(files: Sequence[Path], template: TextTemplate, count: Counts, *, skip_bad: bool) -> Iterator[str]:
    """The usable texts of `files`, counted in `count`."""
    for _, turns, attribution, _ in read_turns(files, template):
        count.rows += 1
        if isinstance(turns, InputError):
            if not skip_bad:
                raise turns
            count.bad += 1
            continue
        count_value(count.licenses, attribution.license)
        count_value(count.origins, attribution.origin)
        yield turns[-1].content
