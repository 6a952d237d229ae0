"""A look at rows: the first ones of every file, and some of those far behind, also of compressed files, CSV and Parquet."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.text.readers.sample import READ_ROWS, Sample

ROWS = 40_000


def json_lines(path: Path, rows: list[dict[str, int]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compressed(path: Path, rows: list[dict[str, int]]) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def csv(path: Path, rows: list[dict[str, int]]) -> None:
    path.write_text("n\n" + "".join(f"{row['n']}\n" for row in rows))


def parquet(path: Path, rows: list[dict[str, int]]) -> None:
    pq.write_table(pa.table({"n": [row["n"] for row in rows]}), path, row_group_size=4000)


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", json_lines), ("a.jsonl.gz", compressed), ("a.csv", csv), ("a.parquet", parquet)]
)
def test_rows_far_behind_the_first_ones_are_looked_at(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, int]]], None]
) -> None:
    write(tmp_path / name, [{"n": n} for n in range(ROWS)])
    sample = Sample([tmp_path / name], {"n"})
    found = [(row.number, int(row.fields()["n"])) for row in sample]
    numbers = [n for _, n in found]
    assert numbers[:1000] == list(range(1000)) and not sample.is_whole
    behind = [n for n in numbers if n >= READ_ROWS]
    assert 40 <= len(behind) <= 300 and max(behind) > 0.8 * ROWS
    if name == "a.parquet":  # the number of a row is its place in the file
        assert all(number == n + 1 for number, n in found)
