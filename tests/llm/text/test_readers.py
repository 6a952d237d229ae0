"""Files as people have them: of any program, in any encoding, with any separator."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from workbooks import Sheets, write_ods, write_xlsx

from llm.errors import InputError
from llm.text.readers import SUFFIXES, FileFormat, encoding_notes, field_names, read_rows
from runner.input_files import READABLE

GERMAN = [
    ("Größe wählen; bitte", "groß"),
    ("Straße für Fußgänger", "weiß"),
    ('sagt "ja"\nund geht', "öfter"),
    ("Müller", "süß"),
]
CHINESE = [
    ("这个产品的质量非常好，我很满意，下次还会再来购买。", "正面"),
    ("物流太慢了，等了整整两个星期才收到货。", "负面"),
] * 8


def fields(path: Path, *, needed: set[str] = frozenset({"text"}), **form: str) -> list[dict[str, object]]:  # type: ignore[assignment]
    return [dict(row.fields()) for row in read_rows([path], set(needed), FileFormat(**form))]


def table(rows: list[tuple[str, str]], separator: str) -> str:
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in [("text", "label"), *rows]]
    return "".join(separator.join(row) + "\r\n" for row in quoted)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
def test_a_table_of_any_separator_and_encoding_has_the_same_rows(tmp_path: Path, separator: str, encoding: str) -> None:
    path = tmp_path / "data.CSV"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    path.write_bytes(mark + table(GERMAN, separator).encode(encoding))
    named = {"encoding": "cp1252"} if encoding == "cp1252" else {}
    assert fields(path, **named) == [{"text": text, "label": label} for text, label in GERMAN]
    found = [note.partition("; ")[0] for note in encoding_notes([path])]
    if encoding != "cp1252":  # whose text is too short to tell it from its siblings
        wanted = {"utf-16-be": "utf-16"}.get(encoding, encoding)
        assert found == ([] if encoding.startswith("utf-8") else [f"data.CSV: is read as {wanted}"])


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_the_encoding_of_chinese_text_is_found(tmp_path: Path, encoding: str) -> None:
    rows = CHINESE if encoding != "big5" else [("這個產品的品質非常好，我很滿意，下次還會再來購買。", "正面")] * 8
    path = tmp_path / "data.csv"
    path.write_bytes(table(rows, ",").encode(encoding))
    assert [row["text"] for row in fields(path)] == [text for text, _ in rows]


def test_a_few_broken_bytes_do_not_change_the_encoding_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\n".encode() * 30 + b"broken \xff\n")
    (row,) = read_rows([path], set())
    assert row.number == 31
    with pytest.raises(InputError, match="expected UTF-8, got other bytes"):
        row.fields()


def test_what_excel_writes_first_names_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sep=;\ntext;n\na,b;1\n")
    (row,) = read_rows([path], {"text"})
    assert (row.number, row.fields()) == (3, {"text": "a,b", "n": "1"})


def test_a_named_delimiter_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text#n\na,b#1\nc,d#2\n")
    assert fields(path, delimiter="#") == [{"text": "a,b", "n": "1"}, {"text": "c,d", "n": "2"}]


def test_names_of_columns_may_hold_anything_and_lose_the_white_space_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(" Review Text ,Note: text\ngood,fine\n")
    assert fields(path, needed={"Review Text"}) == [{"Review Text": "good", "Note: text": "fine"}]


def test_a_column_that_is_there_twice_is_an_error_only_where_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,n,n\na,1,2\n")
    assert fields(path)[0]["text"] == "a"
    with pytest.raises(InputError, match=r"a\.csv: expected one column 'n', got 2 of that name"):
        fields(path, needed={"n"})


ROWS = [{"text": "one"}, {"text": "zwei [2]"}, {"text": 'x}"{', "n": [1, {"a": None}]}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
        "".join(json.dumps(row) + "\n" for row in ROWS),
        "".join(json.dumps(row, indent=2) + "\n" for row in ROWS),
        "\ufeff" + json.dumps(ROWS, indent=1),
        "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    ],
)
def test_a_json_file_is_an_array_or_objects_one_after_the_other(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    assert fields(path) == ROWS


def test_a_row_of_a_json_array_knows_its_line_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n\n "b",\n {"text":\n  "c"}\n]')
    first, second, third = read_rows([path], set())
    assert [row.number for row in (first, second, third)] == [2, 4, 5]
    with pytest.raises(InputError, match='expected an object with fields, got "b"'):
        second.fields()
    path.write_text('[{"text": "a"},\n{"text": "b"')
    with pytest.raises(InputError, match=r"a\.json:2: expected JSON, got '\{\"text\": \"b\"\\n', which does not end"):
        list(read_rows([path], set()))


@pytest.mark.parametrize("content", ['{"text": NaN}', '{"text": Infinity}', '{"text": ' + "9" * 5000 + "}"])
def test_numbers_that_are_none_are_faults_of_their_row(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + content + "\n")
    first, second = read_rows([path], {"text"})
    assert first.fields() == {"text": "fine"}
    with pytest.raises(InputError, match="a line that is not JSON"):
        second.fields()
    (tmp_path / "b.json").write_text(f'[\n{content},\n{{"text": "fine"}}]')
    first, second = read_rows([tmp_path / "b.json"], {"text"})
    assert (first.number, second.number, second.fields()) == (2, 3, {"text": "fine"})
    with pytest.raises(InputError, match="expected JSON, got something else"):
        first.fields()


@pytest.mark.parametrize(("name", "write"), [("a.xlsx", write_xlsx), ("a.ods", write_ods)])
def test_a_sheet_has_the_rows_of_the_table(tmp_path: Path, name: str, write: Callable[[Path, Sheets], None]) -> None:
    path = tmp_path / name
    write(path, {"First": [["other"], [1]], "Data": [["text", "n"], ["a", 1], ["b", 2.5]]})
    assert fields(path, sheet="Data") == [{"text": "a", "n": 1}, {"text": "b", "n": 2.5}]
    assert field_names(path) == ["other"]
    with pytest.raises(InputError, match="expected a sheet 'Dat', got only 'First', 'Data'"):
        fields(path, sheet="Dat")


def test_documents_of_offices_are_read_whole(tmp_path: Path) -> None:
    import docx

    document = docx.Document()
    document.add_paragraph("Ärzte")
    document.add_table(1, 2).rows[0].cells[1].text = "cell"
    document.add_paragraph("end")
    document.save(str(tmp_path / "a.docx"))
    assert fields(tmp_path / "a.docx") == [{"text": "Ärzte\n\tcell\nend"}]
    (tmp_path / "b.md").write_text("# Title\n\nText.\n")
    assert fields(tmp_path / "b.md") == [{"text": "# Title\n\nText."}]


def test_a_pdf_has_its_text_and_a_scan_has_none(tmp_path: Path) -> None:
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(200, 200)
    writer.write(tmp_path / "scan.pdf")
    kinds = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(name): NameObject(kind) for name, kind in kinds.items()})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
    content = DecodedStreamObject()
    content.set_data(b"BT /F1 12 Tf 20 100 Td (Fever and pain) Tj ET")
    page[NameObject("/Contents")] = writer._add_object(content)
    writer.write(tmp_path / "a.pdf")
    assert fields(tmp_path / "a.pdf") == [{"text": "Fever and pain"}]
    with pytest.raises(InputError, match="expected text, got pages without any"):  # its own fault, so that it can be skipped
        fields(tmp_path / "scan.pdf")


@pytest.mark.parametrize("name", ["a.docx", "a.pdf"])
def test_a_document_that_cannot_be_read_is_a_fault_of_its_row(tmp_path: Path, name: str) -> None:
    for content in (b"", b"plain text", b"\x00\xff" * 50):
        (tmp_path / name).write_bytes(content)
        (row,) = read_rows([tmp_path / name], {"text"})
        with pytest.raises(InputError, match="is not a readable"):
            row.fields()


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.csv", b'text,n\na,1\n"b"x,2\nc,3\n', 3),
        ("a.csv", b"text,n\na,1\n\xff,2\nc,3\n", 3),
        ("a.csv", b"text,n\na,1\nb,2,3\nc,3\n", 3),
        ("a.tsv", b"text\tn\na\t1\n\xff\t2\nc\t3\n", 3),
        ("a.json", b'[{"text": "a"},\n{"text":\n "\xff"},\n{"text": "c"}]', 2),
        ("a.jsonl", b'{"text": "a"}\n{"text"}\n{"text": "c"}\n', 2),
    ],
)
def test_what_is_wrong_in_a_row_is_its_own_fault_in_every_format(tmp_path: Path, name: str, content: bytes, bad: int) -> None:
    (tmp_path / name).write_bytes(content)
    first, second, third = read_rows([tmp_path / name], {"text"}, FileFormat(encoding="utf-8"))
    assert (first.fields()["text"], second.number, third.fields()["text"]) == ("a", bad, "c")
    with pytest.raises(InputError, match="expected"):
        second.fields()


@pytest.mark.parametrize("name", ["a.xlsx", "a.ods", "a.parquet", "a.json"])
def test_a_file_that_is_not_what_its_name_says_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    for content in (b"", b"plain text", b"\x00\xff" * 50):
        (tmp_path / name).write_bytes(content)
        if name == "a.json" and not content:
            continue
        with pytest.raises(InputError, match=name):
            list(read_rows([tmp_path / name], {"text"}))


def test_a_string_of_a_parquet_file_that_is_not_utf8_is_a_fault_of_its_row_alone(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(3, *pa.array([b"good", b"bro\xffken", b"fine"]).buffers()[1:])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    first, second, third = read_rows([tmp_path / "a.parquet"], {"text"})
    assert (first.fields(), third.fields()) == ({"text": "good"}, {"text": "fine"})
    with pytest.raises(InputError, match="expected UTF-8"):
        second.fields()


def test_compressed_files_may_have_zeros_behind_them_and_windows_of_any_size(tmp_path: Path) -> None:
    line = b'{"text": "a"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line) + bytes(1000) + gzip.compress(line) + bytes(70_000))
    assert fields(tmp_path / "a.jsonl.gz") == [{"text": "a"}] * 2
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "b.jsonl.ZST").write_bytes(compressor.compress(line) + compressor.flush())
    assert fields(tmp_path / "b.jsonl.ZST") == [{"text": "a"}]


def test_a_folder_stands_for_files_of_these_formats() -> None:
    assert READABLE == SUFFIXES
