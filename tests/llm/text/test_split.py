"""Rows split into parts: every row in one of them, groups whole, labels in their shares, time in order."""

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.text.readers import FileFormat, read_rows
from llm.text.readers.split import Split

ROWS = [
    {"text": f"text {n}", "label": "rare" if n % 100 == 0 else "some" if n % 10 == 0 else "most", "who": n // 4, "day": n}
    for n in range(400)
]


def parts(path: Path, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    names = ("train", "validation", "test")
    forms = [FileFormat(split=Split(part=name, **settings)) for name in names]  # type: ignore[arg-type]
    return {
        name: [dict(row.fields()) for row in read_rows([path], {"text"}, form)]
        for name, form in zip(names, forms, strict=True)
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "a.jsonl"


def test_every_row_is_in_one_part_and_labels_have_their_shares(rows: Path) -> None:
    found = parts(rows, stratify="label")
    assert sorted(row["day"] for part in found.values() for row in part) == list(range(400))
    counted = {name: Counter(row["label"] for row in part) for name, part in found.items()}
    assert counted["test"] == {"most": 36, "some": 4, "rare": 1}
    assert counted["validation"] == {"most": 36, "some": 4}  # four rows of the rare label: one is tested
    assert [row["day"] for row in found["train"]] == sorted(row["day"] for row in found["train"])


def test_the_part_of_a_row_does_not_depend_on_order_or_format_and_equal_rows_stay_together(rows: Path, tmp_path: Path) -> None:
    shuffled = [*ROWS, *ROWS[:50]]
    random.Random(1).shuffle(shuffled)
    pq.write_table(pa.Table.from_pylist(shuffled), tmp_path / "b.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(shuffled)
    first = {name: {row["text"] for row in part} for name, part in parts(rows, group="text").items()}
    for name in ("b.parquet", "c.csv"):
        found = {part: {row["text"] for row in part_rows} for part, part_rows in parts(tmp_path / name, group="text").items()}
        assert found == first
    for name in ("a.jsonl", "b.parquet", "c.csv"):
        told = [{row["text"] for row in part} for part in parts(tmp_path / name).values()]
        assert not told[0] & told[1] and not told[1] & told[2] and not told[0] & told[2]


def test_a_group_stays_together(rows: Path) -> None:
    found = parts(rows, group="who")
    groups = [{row["who"] for row in part} for part in found.values()]
    assert [len(one) for one in groups] == [80, 10, 10]
    assert len(set.union(*groups)) == 100


def test_the_last_rows_in_time_are_tested(rows: Path, tmp_path: Path) -> None:
    found = parts(rows, time="day")
    days = {name: [row["day"] for row in part] for name, part in found.items()}
    assert (max(days["train"]), min(days["validation"]), max(days["validation"]), min(days["test"])) == (319, 320, 359, 360)
    lines = [{"text": "a", "on": None}, *({"text": f"{n}", "on": f"2026-0{1 + n // 9}-{1 + n % 9:02}"} for n in range(27))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*lines, {"text": 1}]) + "no JSON\n")
    dated = FileFormat(split=Split("train", time="on"))
    whole = list(read_rows([tmp_path / "d.jsonl"], set(), dated))
    assert [row.number for row in whole] == [1, *range(2, 23), 29, 30]  # what has no time is trained on, and told there


def test_few_rows_are_tested_before_they_are_validated_on(tmp_path: Path) -> None:
    counts = {}
    for n in (1, 2, 3, 5, 12):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(n)))
        counts[n] = [len(part) for part in parts(tmp_path / "a.jsonl").values()]
    assert counts == {1: [1, 0, 0], 2: [2, 0, 0], 3: [2, 0, 1], 5: [3, 1, 1], 12: [10, 1, 1]}
