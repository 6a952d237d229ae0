"""The text of .docx and .pdf files."""

import time
import zipfile
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.text.readers.rows import RowFault

MOST_BYTES, MOST_TIMES = 2**26, 100  # of what is unpacked; more than both is refused, and usual files grow 3 to 30 times
LONGEST_TEXT = 1 << 26  # characters of a document
MOST_COLUMNS = 1000  # of a table in a .docx file; Word has at most 63
PDF_SECONDS, PDF_BYTES_A_SECOND = 10.0, 20_000  # of processor time, per file; pages of text take 20 ms and 3 kB and more
EXTRA = "pip install 'stockpot[office]'"


def check_archive(path: Path) -> None:
    """InputError if an archive, as .docx, .xlsx and .ods files are, grows beyond reason when it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # no archive, which its own reader tells better
    if size > MOST_BYTES and size > MOST_TIMES * path.stat().st_size:
        raise InputError(f"{path}: expected contents of at most {MOST_TIMES} times the size of the file, got {size:,} bytes")


def docx_text(path: Path) -> str | RowFault:
    """Paragraphs and cells of tables, in order, a line each, or why there are none."""
    try:
        import docx
        from docx.text.paragraph import Paragraph
    except ImportError as error:
        raise InputError(f"{path}: expected the package python-docx, got none; {EXTRA}") from error
    check_archive(path)
    texts: list[str] = []
    length = 0
    try:
        for block in docx.Document(str(path)).iter_inner_content():
            lines = [block.text] if isinstance(block, Paragraph) else map(_row_text, block.rows)
            for line in lines:
                texts.append(line)
                if (length := length + len(line) + 1) > LONGEST_TEXT:
                    return RowFault(f"expected a text of at most {LONGEST_TEXT:,} characters, got a longer one")
    except InputError as error:
        return RowFault(str(error))
    except Exception as error:  # python-docx, lxml and zipfile each raise their own
        return RowFault(f"is not a readable .docx file ({error})")
    return "\n".join(texts)


def _row_text(row: Any) -> str:
    """The cells of a row of a table; InputError if it says that one has the width of very many."""
    widths = sum(cell.grid_span for cell in row._tr.tc_lst) + row.grid_cols_before + row.grid_cols_after
    if widths > MOST_COLUMNS:
        raise InputError(f"expected a table of at most {MOST_COLUMNS:,} columns, got {widths:,}")
    return "\t".join(cell.text for cell in row.cells)


def pdf_text(path: Path) -> str | RowFault:
    """The text of all pages, or why there is none, as in scanned pages."""
    try:
        import pypdf
    except ImportError as error:
        raise InputError(f"{path}: expected the package pypdf, got none; {EXTRA}") from error
    texts: list[str] = []
    length, begun = 0, time.process_time()
    limit = PDF_SECONDS + path.stat().st_size / PDF_BYTES_A_SECOND
    try:
        for page in pypdf.PdfReader(path).pages:
            texts.append(page.extract_text())
            if (length := length + len(texts[-1]) + 1) > LONGEST_TEXT:
                return RowFault(f"expected a text of at most {LONGEST_TEXT:,} characters, got a longer one")
            if time.process_time() - begun > limit:
                return RowFault(f"expected text that is read in {limit:.0f} s, got only {len(texts):,} pages by then")
    except Exception as error:  # pypdf also raises those of Python
        return RowFault(f"is not a readable PDF file ({error})")
    text = "\n".join(texts)
    if not text.strip():
        return RowFault("expected text, got pages without any, as of a scan; run an OCR program over it first")
    return text
