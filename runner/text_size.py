"""How much text files hold, guessed by their beginning: planning looks at large files and does not read them."""

import zlib
from dataclasses import dataclass
from pathlib import Path

SAMPLE = 1 << 18  # bytes of a file
UNPACKED = 3.0  # times the size of a compressed file whose beginning is not looked at


@dataclass(frozen=True)
class TextSize:
    """The text of a file, uncompressed."""

    bytes: float
    rows: float  # lines


def text_size(path: Path) -> TextSize:
    """A guess for one file, exact where it is no longer than the sample."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLE)
    if path.suffix in (".zst", ".parquet"):
        return TextSize(size * UNPACKED, size * UNPACKED / 500)
    text = zlib.decompressobj(wbits=31).decompress(head) if path.suffix == ".gz" else head
    whole = size / len(head) if head else 0.0
    return TextSize(len(text) * whole, text.count(b"\n") * whole)
