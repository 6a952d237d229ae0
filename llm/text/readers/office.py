"""The text of .docx and .pdf files."""

import zipfile
from pathlib import Path

from llm.errors import InputError
from llm.text.readers.rows import RowFault

MOST_BYTES, MOST_TIMES = 2**26, 100  # of what is unpacked; more than both is refused, and usual files grow 3 to 30 times
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
    try:
        blocks = list(docx.Document(str(path)).iter_inner_content())
    except Exception as error:  # python-docx, lxml and zipfile each raise their own
        return RowFault(f"is not a readable .docx file ({error})")
    texts: list[str] = []
    for block in blocks:
        if isinstance(block, Paragraph):
            texts.append(block.text)
        else:
            texts += ["\t".join(cell.text for cell in row.cells) for row in block.rows]
    return "\n".join(texts)


def pdf_text(path: Path) -> str | RowFault:
    """The text of all pages, or why there is none, as in scanned pages."""
    try:
        import pypdf
    except ImportError as error:
        raise InputError(f"{path}: expected the package pypdf, got none; {EXTRA}") from error
    try:
        text = "\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except Exception as error:  # pypdf also raises those of Python
        return RowFault(f"is not a readable PDF file ({error})")
    if not text.strip():
        return RowFault("expected text, got pages without any, as of a scan; run an OCR program over it first")
    return text
