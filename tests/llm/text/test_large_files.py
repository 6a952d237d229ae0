"""Files that are larger than memory, or hostile: what is read of them, and in how much memory."""

import gzip
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from workbooks import write_ods, write_xlsx

from llm.errors import InputError
from llm.text.readers import plain, read_rows, tables
from llm.text.readers.rows import RowFault
from llm.text.readers.workbook_process import read_apart

ROOT = Path(__file__).parents[3]
MIB = 2**20
READ = """
import resource, sys
from pathlib import Path
import zstandard
from llm.text.readers import read_rows

def held(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

if sys.argv[1].endswith(".parquet"):  # Arrow reserves memory that it does not use
    import pyarrow.parquet
    before = held("VmRSS")
else:
    resource.setrlimit(resource.RLIMIT_DATA, (held("VmData") + int(sys.argv[2]) * 2**20, -1))
count = characters = longest = 0
for row in read_rows([Path(sys.argv[1])], {"text"}):
    text = row.fields()["text"]
    count, characters, longest = count + 1, characters + len(text), max(longest, len(text))
if sys.argv[1].endswith(".parquet"):
    assert held("VmHWM") < before + int(sys.argv[2]) * 2**20, held("VmHWM") - before
print(count, characters, longest)
"""


def read_within(path: Path, mib: int) -> tuple[int, int, int]:
    """Rows, characters and the longest row, read by a process that may take `mib` MiB more than it has."""
    command = [sys.executable, "-c", READ, str(path), str(mib)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, characters, longest = map(int, done.stdout.split())
    return count, characters, longest


def paragraphs(size: int) -> Iterator[str]:
    """About `size` bytes of paragraphs, which differ."""
    made = number = 0
    while made < size:
        text = "\n".join(f"Line {number} of a long text, {line}; 心脏." for line in range(40)) + "\n\n"
        number, made = number + 1, made + len(text.encode())
        yield text


def array(size: int) -> Iterator[str]:
    """About `size` bytes of an array of rows on one line."""
    made = number = 0
    while made < size:
        text = ("[" if not number else ", ") + json.dumps({"text": f"row {number} " + "ä{[" * 500}, ensure_ascii=False)
        number, made = number + 1, made + len(text.encode())
        yield text
    yield "]"


def write(path: Path, parts: Iterator[str]) -> int:
    """Write a file, compressed as its name says; how many characters it has."""
    opened = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    characters = 0
    with opened(path, "wb") as file:
        for part in parts:
            file.write(part.encode())
            characters += len(part)
    return characters


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [("a.txt", paragraphs, 48 * MIB), ("a.md.gz", paragraphs, 48 * MIB), ("a.json", array, 36 * MIB)]
    + [
        pytest.param(name, make, 2048 * MIB, marks=pytest.mark.long)
        for name, make in (("b.txt", paragraphs), ("b.txt.zst", paragraphs), ("b.json", array), ("b.json.gz", array))
    ],
)
def test_a_file_of_any_size_is_read_in_32_mib(
    tmp_path: Path, name: str, make: Callable[[int], Iterator[str]], size: int
) -> None:
    written = write(tmp_path / name, make(size))
    count, characters, longest = read_within(tmp_path / name, 32)
    assert count > size / MIB and longest <= plain.CUT_BYTES
    assert abs(characters - written) <= 2 * count if make is paragraphs else characters < written


def test_a_text_is_one_document_up_to_the_longest_that_a_corpus_keeps_and_cut_at_paragraphs_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "LONGEST_DOCUMENT", 2000)
    monkeypatch.setattr(plain, "CUT_BYTES", 300)
    path, text = tmp_path / "a.txt", "".join(f"心脏 {n}.\n\n" if n % 9 == 0 else f"Sentence {n}.\n" for n in range(200))
    path.write_text(text[:1999])
    (row,) = read_rows([path], {"text"})
    assert row.fields()["text"] == text[:1999].removesuffix("\n")
    path.write_text(text)
    rows = list(read_rows([path], {"text"}))
    texts = [row.fields()["text"] for row in rows]
    assert len(rows) > 10 and "".join(part + "\n" for part in texts) == text  # nothing is lost, and each ends with a line
    assert all(part.endswith("\n") for part in texts[:-1])  # the first of two line feeds: with a paragraph
    assert [row.number for row in rows] == [
        1 + "".join(part + "\n" for part in texts[:n]).count("\n") for n in range(len(rows))
    ]
    (tmp_path / "b.md").write_text("".join(f"# Chapter {n}\n\nText.\n\nText.\n\nMore {'text ' * 20}\n\n" for n in range(30)))
    chapters = [row.fields()["text"] for row in read_rows([tmp_path / "b.md"], {"text"})]
    assert len(chapters) > 10 and all(chapter.startswith("# Chapter") for chapter in chapters)


@pytest.mark.parametrize("text", ["心" * 900, "word " * 500, "A sentence. Another one. " * 90, "a" * 2500, "é" * 1500])
def test_a_text_without_lines_is_cut_between_sentences_words_or_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(plain, "LONGEST_DOCUMENT", 800)
    monkeypatch.setattr(plain, "CUT_BYTES", 301)
    (tmp_path / "a.txt").write_text(text)
    texts = [row.fields()["text"] for row in read_rows([tmp_path / "a.txt"], {"text"})]
    assert "".join(texts) == text and len(texts) > 4 and max(len(part.encode()) for part in texts) <= 301
    if " " in text:
        assert all(part.endswith(". " if "." in text else " ") for part in texts[:-1])


def test_broken_bytes_in_a_large_text_are_a_fault_of_their_document_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "LONGEST_DOCUMENT", 800)
    monkeypatch.setattr(plain, "CUT_BYTES", 300)
    content = [f"Größe {number}\n".encode() for number in range(100)]
    content[50] = b"broken \xff\n"
    (tmp_path / "a.txt").write_bytes(b"".join(content))
    rows = list(read_rows([tmp_path / "a.txt"], {"text"}))
    (bad,) = (row for row in rows if isinstance(row.content, RowFault))
    assert len(rows) > 3 and bad.number == 51


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1000])
def test_a_json_file_has_the_same_rows_wherever_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    from llm.text.readers import json_values, streams

    path = tmp_path / "a.json"
    rows = [{"text": "心脏 \\ {[", "n": [1, {"a": -1.5e3}]}, {"text": ""}, 123456, "no object", {"text": "é" * 9}]
    for content in (json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        path.write_text("\ufeff" + content, encoding="utf-8")
        whole = list(read_rows([path], set()))
        with monkeypatch.context() as patch:
            patch.setitem(streams.READ, "", block)
            patch.setattr(json_values, "PIECE", 8)
            assert list(read_rows([path], set())) == whole
        assert [row.content for row in whole if isinstance(row.content, dict)] == [
            row for row in rows if isinstance(row, dict)
        ]
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"},\n{"text": "b"}]')
    monkeypatch.setitem(streams.READ, "", block)
    assert [isinstance(row.content, RowFault) for row in read_rows([path], set())] == [False, True, False]


def test_a_value_of_json_that_does_not_end_is_told_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.text.readers import json_values

    monkeypatch.setattr(json_values, "LONGEST_LINE", MIB)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": ["' + "x\\n\n" * MIB)
    with pytest.raises(InputError, match=r"a\.json:2: expected a value of at most 1,048,576 characters, got a longer one, or"):
        list(read_rows([path], set()))


def test_a_quotation_mark_that_nothing_closes_costs_a_bounded_part_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST_LINE", 50_000)
    path = tmp_path / "a.csv"
    lines = [f"text {number},{number}\n" for number in range(20_000)]
    lines[7] = '"open,7\n'
    path.write_text("text,n\n" + "".join(lines))
    rows = list(read_rows([path], {"text"}))
    good = [row.fields() for row in rows if not isinstance(row.content, RowFault)]
    (bad,) = (row for row in rows if isinstance(row.content, RowFault))
    assert bad.number == 9 and "expected a row of at most 50,000 characters, got a longer one, or a quote" in bad.content
    assert len(good) > 15_000 and good[-1] == {"text": "text 19999", "n": "19999"}


def test_rows_of_a_parquet_file_are_read_a_few_at_a_time_however_it_stores_them(tmp_path: Path) -> None:
    long = "x" * MIB
    many = [f"{number} {long}" for number in range(160)]  # 160 MiB in one row group, compressed to little
    pq.write_table(
        pa.table({"text": many}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_batch_size=4
    )
    assert read_within(tmp_path / "a.parquet", 128)[0] == 160
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 800, pa.int32()), [long])  # 800 MiB of one value
    pq.write_table(pa.table({"text": same}), tmp_path / "b.parquet")
    assert read_within(tmp_path / "b.parquet", 256) == (800, 800 * MIB, MIB)


def change(path: Path, name: str, old: str, new: str) -> None:
    """Replace a text in a file of an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {each: archive.read(each).decode() for each in archive.namelist()}
    assert old in files[name]
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content.replace(old, new) if each == name else content)


def test_a_small_workbook_that_means_a_huge_sheet_is_told_and_ends_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = {"Data": [["text", "n"], ["a", 1.0], ["b", 2.5]]}
    far, repeated = tmp_path / "far.xlsx", tmp_path / "repeated.ods"
    write_xlsx(far, sheet)
    change(far, "xl/worksheets/sheet1.xml", "<c><v>2.5</v></c>", '<c r="XFD1048576"><v>2.5</v></c>')
    with pytest.raises(
        InputError, match=r"far\.xlsx: expected a workbook that is read in 2 GiB, got one that takes more, or .*csv"
    ):
        list(read_rows([far], {"text"}))
    write_ods(repeated, sheet)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "read_apart", partial(read_apart, most_memory=64 * MIB))
        assert [row.fields() for row in read_rows([repeated], {"text"})] == [{"text": "a", "n": 1}, {"text": "b", "n": 2.5}]
        change(repeated, "content.xml", "<table:table-row>", '<table:table-row table:number-rows-repeated="1000000">')
        with pytest.raises(InputError, match=r"repeated\.ods: expected a workbook that is read in 0\.0625 GiB"):
            list(read_rows([repeated], {"text"}))
