"""Mixtures of sources of rows: the share of each, and the order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data.batch import IGNORE, PackedRow
from llm.data.conversations import TextTemplate
from llm.data.mixture import JoinedRows, mixed, write_texts
from llm.data.token_rows import TokenRows
from llm.errors import InputError, Interrupted
from llm.tokenizer.train_bpe import train_bpe


class Named:
    """Rows that hold the number of their source and their index."""

    context = 4

    def __init__(self, name: int, rows_per_epoch: int = 10) -> None:
        self.name, self.rows_per_epoch = name, rows_per_epoch

    def row(self, index: int) -> PackedRow:
        return PackedRow(np.array([self.name, index, 0, 0]), np.full(4, IGNORE), np.zeros(4, dtype=np.int32))


@pytest.mark.parametrize("shares", [[0.2], [0.3, 0.05], [0.5, 0.25, 0.1], [0.999]])
def test_after_any_number_of_rows_each_source_has_its_share_and_gives_its_rows_in_order(shares: list[float]) -> None:
    rows = mixed(Named(0), [(Named(number), share) for number, share in enumerate(shares, start=1)])
    wanted = [1 - sum(shares), *shares]
    counts: Counter[int] = Counter()
    for index in range(2000):
        source, place, *_ = rows.row(index).tokens.tolist()
        assert place == counts[source]  # none is left out and none comes twice
        counts[source] += 1
        for name, share in enumerate(wanted):
            assert abs(counts[name] - share * (index + 1)) <= len(shares)


def test_a_row_depends_only_on_its_index_and_an_epoch_is_one_of_the_main_source() -> None:
    rows = mixed(Named(0, rows_per_epoch=80), [(Named(1), 0.2)])
    backwards = [rows.row(index).tokens.tolist() for index in reversed(range(50))]
    assert backwards[::-1] == [rows.row(index).tokens.tolist() for index in range(50)]
    assert rows.rows_per_epoch == 100


def test_texts_become_rows_of_separate_documents_with_every_token_a_target(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"body": "the heart"}\n{"body": ""}\n{"body": "pumps"}\n{"body": "blood"}\n' * 20)
    tokenizer = train_bpe(["the heart pumps blood"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)

    def write(*, skip_bad: bool) -> None:
        write_texts(
            tmp_path / "texts",
            [tmp_path / "text.jsonl"],
            TextTemplate("body"),
            tokenizer=tokenizer,
            context=8,
            skip_bad=skip_bad,
            report=lambda **_: None,
            should_stop=lambda: False,
        )

    with pytest.raises(InputError, match=r"text\.jsonl:2: the text: expected text, got only white space"):
        write(skip_bad=False)
    write(skip_bad=True)
    short = TokenRows(tmp_path / "texts", seed=1, context=8)
    long = JoinedRows(short, 4)
    assert (long.context, long.rows_per_epoch) == (32, short.rows_per_epoch // 4)
    row = long.row(1)
    parts = [short.row(index) for index in range(4, 8)]
    assert row.tokens.tolist() == [token for part in parts for token in part.tokens.tolist()]
    assert row.targets.tolist() == [token for part in parts for token in part.targets.tolist()]
    borders = np.flatnonzero(np.diff(row.documents)) + 1
    assert {8, 16, 24} <= set(borders.tolist())  # parts never share a document
    assert sorted(set(row.documents.tolist())) == list(range(row.documents.max() + 1))
    assert (row.targets != IGNORE).sum() > 16


def test_texts_that_are_tokenized_are_not_tokenized_again_after_a_stop(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"the heart pumps {number}"}) + "\n" for number in range(1000)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    tokenizer = train_bpe(["the heart pumps blood"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)

    def write(name: str, **options: Any) -> list[int]:
        done: list[int] = []
        given: dict[str, Any] = {"should_stop": lambda: False, "shard_tokens": 500, **options}
        given |= {
            "tokenizer": tokenizer,
            "context": 8,
            "skip_bad": False,
            "report": lambda **values: done.append(values["done"]),
        }
        write_texts(tmp_path / name, [tmp_path / "text.jsonl"], TextTemplate("text"), **given)
        return done

    whole = write("whole")
    stops = iter([False, False, True])
    with pytest.raises(Interrupted):
        write("stopped", should_stop=lambda: next(stops))
    assert not (tmp_path / "stopped").exists()
    resumed = write("stopped")
    assert len(resumed) < len(whole) and resumed[-1] == whole[-1] == 1000
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes() for name in names)
