"""Compressed data that is small on disk and huge in memory: the first row is looked at before anything runs, and the bounds
hold there and in every stage that reads rows.
"""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from bounded import bounded

from llm.errors import InputError
from llm.text.readers import field_names, read_rows
from runner.planning.model_shape import text_bytes


def zst_of(byte: bytes, blocks: int, *, before: bytes = b"") -> bytes:
    """A frame of zstd with blocks of 128 KiB of one byte, of which each takes 4 bytes (RFC 8878, run-length blocks)."""
    head = struct.pack("<I", 0xFD2FB528) + bytes([0x00, 0x58])  # a window of 2 MiB
    size = 128 * 1024
    raw = struct.pack("<I", len(before) << 3)[:3] + before if before else b""
    body = (struct.pack("<I", size << 3 | 1 << 1)[:3] + byte) * (blocks - 1)
    return head + raw + body + struct.pack("<I", size << 3 | 1 << 1 | 1)[:3] + byte


def gz_of(content: bytes, members: int) -> bytes:
    return gzip.compress(content, 9) * members


BOMBS: dict[str, Callable[[], bytes]] = {
    "letters.jsonl.zst": lambda: zst_of(b"a", 100_000),  # 13 GB
    "text.jsonl.zst": lambda: zst_of(b"a", 100_000, before=b'{"text": "'),
    "lists.jsonl.zst": lambda: zst_of(b"[", 24_000),
    "lines.jsonl.zst": lambda: zst_of(b"\n", 600),
    "letters.csv.zst": lambda: zst_of(b"a", 100_000),
    "quote.csv.zst": lambda: zst_of(b"a", 100_000, before=b'text\n"'),
    "commas.csv.zst": lambda: zst_of(b",", 100_000),
    "letters.tsv.zst": lambda: zst_of(b"a", 100_000),
    "letters.txt.zst": lambda: zst_of(b"a", 100_000),
    "letters.jsonl.gz": lambda: gz_of(b"a" * 2**24, 100),
    "letters.csv.gz": lambda: gz_of(b"a" * 2**24, 100),
    "letters.txt.gz": lambda: gz_of(b"a" * 2**24, 100),
    "deep.jsonl": lambda: b"[" * 1_000_000,
    "number.jsonl": lambda: b"9" * 1_000_000,
    "zeros.jsonl": lambda: b"\0" * 1_000_000,
    "cut.jsonl.zst": lambda: zst_of(b"a", 10)[:-2],
    "cut.jsonl.gz": lambda: gz_of(b"a\n" * 1000, 1)[:-9],
    "none.jsonl.zst": lambda: b"",
    "empty.parquet": lambda: b"PAR1PAR1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_the_first_row_takes_little_time_and_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())

    def look() -> int:
        try:
            field_names(path)
            next(iter(read_rows([path], set())), None)
            return 0
        except InputError:
            return 3

    assert bounded(look) in (0, 3)
    assert bounded(lambda: text_bytes(path) >= 0) in (0, 1)


def test_a_line_that_is_too_long_is_named_with_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zst_of(b"a", 1000, before=b'{"text": "x"}\n'))
    rows = read_rows([path], set())
    assert next(rows).fields() == {"text": "x"}
    with pytest.raises(InputError, match=r"long.jsonl.zst:2: expected a line of at most 33,554,432 bytes, got a longer one"):
        next(rows)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_rows_longer_than_any_piece_are_read_whole(tmp_path: Path, ending: str) -> None:
    import zstandard

    path, texts = tmp_path / f"rows{ending}", ["a" * 5_000_000, "b", "c" * 3_000_000]
    content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    packed = {".jsonl": content, ".jsonl.gz": gzip.compress(content), ".jsonl.zst": zstandard.compress(content)}
    path.write_bytes(packed[ending])
    assert [row.fields()["text"] for row in read_rows([path], set())] == texts


@pytest.mark.parametrize("text", ["a\nb", "a\nb\n", "a\n\n", "", "\n", "\n\na"])
def test_a_text_keeps_its_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    (row,) = read_rows([path], set())
    assert row.fields() == {"text": text.removesuffix("\n")}
