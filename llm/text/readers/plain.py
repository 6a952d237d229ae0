"""Plain text: a file is one document, and a larger one several, so that no text is too large to read or to keep."""

from collections.abc import Iterator
from pathlib import Path

from llm.text.readers.rows import FileRow, RowFault, not_utf8
from llm.text.readers.streams import blocks

LONGEST_DOCUMENT = 5_000_000  # characters: the longest novels, and what a corpus keeps of a document by default
CUT_BYTES = 1 << 18  # most of a document of a larger file: 65,000 tokens of English, as long as the longest contexts
_CONTINUING = bytes(range(0x80, 0xC0))  # bytes that go on with a character
# Where a document may end, the best first: before a heading; after a paragraph, a line, a sentence, a word. With the number of
# bytes that stay with the document.
_HEADINGS = ((b"\n# ", 1), (b"\n## ", 1))
_ENDS = ((b"\n\n", 2), (b"\n\r\n", 3), (b"\n", 1), ("。".encode(), 3), (b". ", 2), (b" ", 1))


def read_text(path: Path, encoding: str, *, has_headings: bool) -> Iterator[FileRow]:
    """The text of a file as the row of one document; of more than LONGEST_DOCUMENT characters, as rows of at most CUT_BYTES
    that end with a paragraph where they can. Each row knows its first line. At most four bytes for each of LONGEST_DOCUMENT
    are in memory.
    """
    pending, characters, number = bytearray(), 0, 1
    for block in blocks(path, encoding):
        pending += block
        characters += len(block.translate(None, _CONTINUING))
        while characters > LONGEST_DOCUMENT and len(pending) > CUT_BYTES:
            end = _end(pending, _HEADINGS + _ENDS if has_headings else _ENDS)
            yield _document(path, number, bytes(pending[:end]))
            number += pending.count(b"\n", 0, end)
            del pending[:end]
    if pending or not characters:
        yield _document(path, number, bytes(pending))


def _end(text: bytearray, ends: tuple[tuple[bytes, int], ...]) -> int:
    """Where to cut a text that is longer than CUT_BYTES: in the second half of them."""
    for mark, kept in ends:
        found = text.rfind(mark, CUT_BYTES // 2, CUT_BYTES)
        if found >= 0:
            return found + kept
    end = CUT_BYTES
    while CUT_BYTES - end < 3 and text[end] in _CONTINUING:  # no character has more of them
        end -= 1
    return end


def _document(path: Path, number: int, content: bytes) -> FileRow:
    try:
        return FileRow(str(path), number, {"text": content.removesuffix(b"\n").decode()})
    except UnicodeDecodeError as error:
        return FileRow(str(path), number + content.count(b"\n", 0, error.start), RowFault(not_utf8(error)))
