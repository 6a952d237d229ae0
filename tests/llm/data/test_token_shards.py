"""Shards of token ids, and rows of them."""

import json
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.batch import IGNORE, PackedRow
from llm.data.token_rows import TokenRows
from llm.data.token_shards import META, TokenShards, TokenWriter

PADDING = 2


def write(
    folder: Path,
    lengths: list[int],
    *,
    passes: list[int] | None = None,
    shard_tokens: int = 20,
    vocab_size: int = 100_000,
    sources: bool = False,  # whether the source is named after the length
) -> list[list[int]]:
    """Documents whose ids are all different, so that a token identifies its place."""
    ids = iter(range(10, vocab_size))
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    with TokenWriter(folder, vocab_size=vocab_size, context=8, padding=PADDING, shard_tokens=shard_tokens) as writer:
        for number, document in enumerate(documents):
            source = f"s{len(document)}" if sources else ""
            writer.append(document, passes=passes[number] if passes else 1, text_bytes=3 * len(document), source=source)
        writer.finish()
    return documents


def learned_pairs(rows: list[PackedRow]) -> list[tuple[int, int]]:
    """(token, target) of each position with a target."""
    return [
        (int(token), int(target))
        for row in rows
        for token, target in zip(row.tokens, row.targets, strict=True)
        if target != IGNORE
    ]


def equal(one: PackedRow, other: PackedRow) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "targets", "documents"))


corpora = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=12)


@given(corpora, st.integers(2, 24), st.integers(0, 3), st.integers(5, 60))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_token_as_often_as_its_document_has_passes(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[tuple[int, int]], context: int, epoch: int, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    passes = [document_passes for _, document_passes in corpus]
    documents = write(folder, [length for length, _ in corpus], passes=passes, shard_tokens=shard_tokens)
    rows = TokenRows(folder, context=context, seed=5)
    wanted = sorted(token for document, times in zip(documents, passes, strict=True) for token in document * times)
    found = [rows.row(epoch * rows.rows_per_epoch + place) for place in range(rows.rows_per_epoch)]
    seen = sorted(int(token) for row in found for token in row.tokens[row.documents >= 0])
    total = len(wanted)
    assert rows.rows_per_epoch == max(total // context, 1)
    for token in seen:
        wanted.remove(token)
    assert len(wanted) == (total % context if total >= context else 0)  # what is left out is less than a row


@given(corpora, st.integers(2, 24), st.sampled_from([None, 0, 7]))
@settings(max_examples=60, deadline=None)
def test_a_target_is_the_next_token_of_the_same_document(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[tuple[int, int]], context: int, seed: int | None
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    documents = write(folder, [length for length, _ in corpus], passes=[times for _, times in corpus])
    successor = {token: following for document in documents for token, following in pairwise(document)}
    owner = {token: number for number, document in enumerate(documents) for token in document}
    rows = TokenRows(folder, context=context, seed=seed)
    for row in map(rows.row, range(2 * rows.rows_per_epoch)):
        real = row.documents >= 0
        assert (row.tokens[~real] == PADDING).all()
        assert (row.targets[~real] == IGNORE).all()
        for token, target in zip(row.tokens[real].tolist(), row.targets[real].tolist(), strict=True):
            assert target == successor.get(token, IGNORE)
        for number in set(row.documents[real].tolist()):
            assert len({owner[token] for token in row.tokens[row.documents == number].tolist()}) == 1


def test_a_row_depends_only_on_its_index(tmp_path: Path) -> None:
    write(tmp_path, [5, 9, 2, 14, 3, 7, 11], passes=[1, 2, 1, 3, 1, 1, 2])
    forwards, backwards = TokenRows(tmp_path, context=6, seed=3), TokenRows(tmp_path, context=6, seed=3)
    indices = range(4 * forwards.rows_per_epoch)
    first = {index: forwards.row(index) for index in indices}
    second = {index: backwards.row(index) for index in reversed(indices)}
    assert all(equal(first[index], second[index]) for index in indices)


def test_each_epoch_and_seed_has_its_own_order(tmp_path: Path) -> None:
    write(tmp_path, [4] * 30)
    rows, other = TokenRows(tmp_path, context=120, seed=3), TokenRows(tmp_path, context=120, seed=4)
    orders = [tuple(rows.row(0).tokens), tuple(rows.row(1).tokens), tuple(other.row(0).tokens)]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_the_rows_of_a_long_document_are_spread_over_the_epoch(tmp_path: Path) -> None:
    long, *_ = write(tmp_path, [400] + [8] * 150, shard_tokens=10_000)
    rows = TokenRows(tmp_path, context=8, seed=3)
    steps = [[rows.row(step * 10 + place) for place in range(10)] for step in range(rows.rows_per_epoch // 10)]
    of_long = [sum(bool(np.isin(row.tokens, long).any()) for row in step) for step in steps]
    assert max(of_long) < 8  # in the order of the text, four steps of ten rows were of this document alone
    assert sum(count > 0 for count in of_long) >= 16


def test_validation_covers_every_document_once_sorted_by_length(tmp_path: Path) -> None:
    documents = write(tmp_path, [5, 9, 2, 14], passes=[1, 2, 1, 3])
    documents.sort(key=len)
    rows = TokenRows(tmp_path, context=7, seed=None)
    found = [rows.row(index) for index in range(rows.rows_per_epoch)]
    tokens = [int(token) for row in found for token in row.tokens[row.documents >= 0]]
    assert tokens == [token for document in documents for token in document]
    assert learned_pairs(found) == [pair for document in documents for pair in pairwise(document)]
    assert equal(rows.row(0), rows.row(rows.rows_per_epoch))


def test_a_document_that_continues_in_the_next_row_has_a_target_across_the_cut(tmp_path: Path) -> None:
    (document,) = write(tmp_path, [9])
    rows = TokenRows(tmp_path, context=4, seed=None)
    assert rows.row(0).targets.tolist() == document[1:5]
    assert rows.row(2).targets.tolist() == [IGNORE] * 4
    assert rows.row(2).documents.tolist() == [0, -1, -1, -1]


def test_training_on_less_than_a_row_pads_it(tmp_path: Path) -> None:
    write(tmp_path, [3])
    rows = TokenRows(tmp_path, seed=1)
    assert (rows.rows_per_epoch, rows.context) == (1, 8)  # the context is the one it was packed for
    assert rows.row(0).documents.tolist() == [0, 0, 0, -1, -1, -1, -1, -1]


def test_a_split_without_documents_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert len(TokenShards(tmp_path)) == 0
    assert TokenRows(tmp_path, seed=None).rows_per_epoch == 0


def test_documents_come_back_from_shards_that_end_between_documents(tmp_path: Path) -> None:
    documents = write(tmp_path, [8, 8, 8, 50, 3, 1], shard_tokens=20)
    shards = TokenShards(tmp_path)
    assert [shards.document(index).tolist() for index in range(len(shards))] == documents
    assert [path.stat().st_size // 4 for path in sorted(tmp_path.glob("*.bin"))] == [16, 8, 50, 4]
    assert (shards.tokens, shards.bytes) == (78, 234)
    table, shard = shards.look_up(np.arange(6))
    assert table["bytes"].tolist() == [24, 24, 24, 150, 9, 3]
    assert shard.tolist() == [0, 0, 1, 2, 3, 3]


def test_held_out_rows_say_of_which_source_each_token_is_and_how_much_text_it_stands_for(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, vocab_size=100, context=4, padding=PADDING, shard_tokens=9) as writer:
        for source, token, length, text_bytes in (("zh", 20, 5, 15), ("en", 30, 3, 12), ("zh", 21, 2, 6), ("en", 31, 4, 16)):
            writer.append([token] * length, passes=1, text_bytes=text_bytes, source=source)
        writer.finish()
    rows = TokenRows(tmp_path, seed=None)
    assert rows.sources == ["zh", "en"]
    found = [rows.row(index) for index in range(rows.rows_per_epoch)]
    assert np.concatenate([row.tokens for row in found]).tolist() == [21] * 2 + [20] * 5 + [30] * 3 + [31] * 4 + [PADDING] * 2
    sources, text_bytes = (np.concatenate([getattr(row, name) for row in found]) for name in ("sources", "text_bytes"))
    assert sources[:14].tolist() == [0] * 7 + [1] * 7
    assert text_bytes.tolist() == [3] * 7 + [4] * 7 + [0] * 2
    assert TokenRows(tmp_path, seed=0).row(0).sources is None


def test_rows_need_memory_for_no_list_of_all_documents(tmp_path: Path) -> None:
    documents = 300_000
    with TokenWriter(tmp_path, vocab_size=100, context=64, padding=PADDING, shard_tokens=500_000) as writer:
        for number in range(documents):
            writer.append([number % 90 + 3] * 7, passes=1 + (number > 250_000), text_bytes=7)
        writer.finish()
    tracemalloc.start()
    rows = TokenRows(tmp_path, seed=1)
    first = rows.row(0)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (first.documents >= 0).all()
    assert kept < documents  # a byte for each


def test_a_token_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    write(tmp_path, [8, 8])
    os.truncate(tmp_path / "shard-00000.bin", 10)
    with pytest.raises(OSError, match="cut short"):
        TokenRows(tmp_path, seed=None).row(1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    with TokenWriter(tmp_path, vocab_size=vocab_size, context=4, padding=PADDING) as writer:
        writer.append([0, vocab_size - 1], passes=1, text_bytes=1)
        writer.finish()
    assert json.loads((tmp_path / "meta.json").read_text())["dtype"] == dtype
    assert TokenShards(tmp_path).document(0).tolist() == [0, vocab_size - 1]


def test_a_writer_that_was_killed_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    documents = write(tmp_path / "whole", [8, 8, 8, 50, 3, 1, 19], shard_tokens=20, sources=True)
    options = {"vocab_size": 100_000, "context": 8, "padding": PADDING, "shard_tokens": 20}
    for killed_after in (0, 2, 4, 5, 7):
        folder = tmp_path / f"killed-{killed_after}"
        with TokenWriter(folder, **options) as killed:
            for document in documents[:killed_after]:
                killed.append(document, passes=1, text_bytes=3 * len(document), source=f"s{len(document)}")
        assert not (folder / META).exists()
        with TokenWriter(folder, **options) as writer:
            assert writer.documents <= killed_after
            for document in documents[writer.documents :]:
                writer.append(document, passes=1, text_bytes=3 * len(document), source=f"s{len(document)}")
            writer.finish()
        whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
