"""Rows from files of every format, and the shards made of them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm.errors import InputError
from llm.text.readers import read_rows
from llm.text.readers.rows import FileRow, RowFault
from llm.text.sources import Source, cut_into_shards

TEXTS = ["first document", "第二篇文档", 'third, with a comma, a "quote"\nand a second line']


def rows(source: Source, shard_bytes: int = 1 << 20) -> list[FileRow]:
    return [row for shard in cut_into_shards([source], shard_bytes) for row in shard.rows]


def texts(source: Source) -> list[str]:
    return [
        (json.loads(row.content) if isinstance(row.content, bytes) else row.content)["text"]  # type: ignore[index]
        for row in rows(source)
    ]


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    lines = json_lines(TEXTS)
    table = "id,text\n" + "".join('1,"' + text.replace('"', '""') + '"\n' for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.csv").write_text(table)
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + table.encode()))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "f.parquet")
    for number, text in enumerate(TEXTS):
        (tmp_path / f"g{number}.txt").write_text(text)
    for pattern in ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.csv", "e.csv.gz", "f.parquet", "g*.txt"]:
        files = sorted(tmp_path.glob(pattern))
        assert texts(Source("s", files=tuple(files))) == TEXTS, pattern
        assert [row.fields()["text"] for row in read_rows(files, {"text"})] == TEXTS, pattern


def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path: Path) -> None:
    halves = [json_lines(TEXTS[:1]), json_lines(TEXTS[1:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
    assert texts(Source("s", files=(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst"))) == TEXTS * 2


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_that_ends_too_early_is_an_error_with_its_line(tmp_path: Path, suffix: str, compress) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(b"".join(json.dumps({"text": f"{number} {number**5 % 1009}"}).encode() + b"\n" for number in range(9000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"a\.jsonl{suffix}:\d+: the compressed file is damaged"):
        rows(Source("s", files=(path,)))


def test_a_gzip_file_whose_bytes_changed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    damaged = bytearray(gzip.compress(json_lines(TEXTS)))
    damaged[-6] ^= 1  # in the checksum
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        rows(Source("s", files=(path,)))


def test_rows_know_their_line_though_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n  \n\n{"text": "b"}')
    assert [(row.place, row.number) for row in rows(Source("s", files=(path,)))] == [(str(path), 2), (str(path), 5)]


def test_a_csv_row_knows_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"two\nlines",1\nnext,2\nshort\n')
    found = rows(Source("s", files=(path,)))
    assert [row.number for row in found] == [2, 4, 5]
    assert isinstance(found[2].content, RowFault)


def test_a_csv_cell_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert [len(text) for text in texts(Source("s", files=(tmp_path / "a.csv",)))] == [200_000]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_table_without_the_column_is_an_error_that_lists_its_columns(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("title,body\nx,y\n")
    else:
        pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), path)
    with pytest.raises(InputError, match=rf"{name}: expected one column 'text', got only 'title', 'body'"):
        rows(Source("s", files=(path,)))


def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path) -> None:
    for name in ["a.jsonl.gz", "b.jsonl.zst", "c.parquet"]:
        (tmp_path / name).write_bytes(b"plain text, and a little more of it")
        with pytest.raises(InputError, match=name):
            rows(Source("s", files=(tmp_path / name,)))
    (tmp_path / "d.html").write_bytes(b"")
    with pytest.raises(InputError, match=r"d\.html: expected a file named"):
        rows(Source("s", files=(tmp_path / "d.html",)))


def test_shards_have_the_wanted_size_and_hold_one_source_each(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(["x" * 100] * 10))
    sources = [Source(name, files=(tmp_path / f"{name}.jsonl",)) for name in "ab"]
    shards = list(cut_into_shards(sources, 300))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert [(shard.source, len(shard.rows)) for shard in shards] == [(0, 3)] * 3 + [(0, 1)] + [(1, 3)] * 3 + [(1, 1)]


def test_shards_are_read_as_they_are_needed() -> None:
    seen = []

    def endless():
        while True:
            seen.append(len(seen))
            yield {"text": "x" * 100}

    shards = cut_into_shards([Source("s", rows=endless, place="endless")], 1000)
    next(shards)
    assert len(seen) < 20


def test_a_limit_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    assert texts(Source("s", files=(tmp_path / "a.jsonl",), limit=2)) == TEXTS[:2]
