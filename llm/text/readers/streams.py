"""The lines of a text file, decompressed and in UTF-8, whatever encoding the file has."""

import codecs
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from llm.errors import InputError

READ = {"": 1 << 16, ".gz": 1 << 16, ".zst": 1 << 11}  # bytes read at a time, of which no compression makes more than 64 MiB
PIECE = 1 << 20  # bytes looked at at a time
LONGEST_LINE = 32 << 20  # bytes; a long book has 5 MB
LEAST_TEXT, MOST_TIMES = 1 << 28, 200  # bytes, and times the size of a compressed file: more than both together is refused
SAMPLE = 1 << 18  # bytes at the beginning of a file that tell its encoding
LARGEST_WINDOW = 2**31  # bytes, as `zstd --long=31` writes
MARKS = {  # byte order marks; the longer ones first, since that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def lines(path: Path, encoding: str | None = None) -> Iterator[bytes]:
    """Lines without their line feed, in UTF-8 and without a byte order mark; text after the last line feed is a line too.

    `encoding` is that of the file; by default what its byte order mark says, else UTF-8, whose faults the caller finds.
    """
    rest: list[bytes] = []  # pieces of a line that is longer than a block
    number, length = 1, 0
    for block in blocks(path, encoding):
        first, *others = block.split(b"\n")
        rest.append(first)
        length += len(first)
        if length > LONGEST_LINE:
            raise InputError(f"{path}:{number}: expected a line of at most {LONGEST_LINE:,} bytes, got a longer one")
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest, length = [others[-1]], len(others[-1])
            number += len(others)
    if last := b"".join(rest):
        yield last


def blocks(path: Path, encoding: str | None = None) -> Iterator[bytes]:
    """The text in UTF-8, without a byte order mark, in blocks of about PIECE that may end inside a character; `encoding` as in
    `lines`.
    """
    import zstandard

    encoding = encoding or marked_encoding(_beginning(path, 4)) or "utf-8"
    number, beginning = 1, b""
    try:
        for block in _in_utf8(_blocks(path), encoding):
            if len(beginning) < len(codecs.BOM_UTF8):
                beginning += block
                if len(beginning) >= len(codecs.BOM_UTF8):
                    yield beginning.removeprefix(codecs.BOM_UTF8)
            else:
                yield block
            number += block.count(b"\n")
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise InputError(
            f"{path}:{number}: the compressed file is damaged after this line ({error}); fetch it again"
        ) from error
    except UnicodeError as error:
        raise InputError(f"{path}:{number}: expected {encoding} after this line, got other bytes ({error})") from error
    if 0 < len(beginning) < len(codecs.BOM_UTF8):
        yield beginning


def text_encoding(path: Path) -> str:
    """The encoding of a text file: by its byte order mark; UTF-8 where nearly all lines are; else as charset-normalizer finds
    it from the first 256 KiB. InputError where it finds none.
    """
    sample = _beginning(path, SAMPLE)
    if mark := marked_encoding(sample):
        return mark
    if _is_utf8(sample):
        return "utf-8"
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample).best()
    if best is None:
        raise InputError(f'{path}: expected text, got bytes of no known encoding; name it: read = {{ encoding = "..." }}')
    return best.encoding.replace("_", "-")


def marked_encoding(sample: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning names; None without one."""
    return next((encoding for mark, encoding in MARKS.items() if sample.startswith(mark)), None)


def _is_utf8(sample: bytes) -> bool:
    """Whether nine of ten lines that are not plain ASCII are UTF-8: a few broken bytes make no other encoding."""
    if b"\0" in sample:
        return False
    unfinished = sample.rfind(b"\n") if len(sample) >= SAMPLE and b"\n" in sample else len(sample)
    told = [line for line in sample[:unfinished].split(b"\n") if not line.isascii()]
    good = sum(_decodes(line, whole=len(sample) < SAMPLE) for line in told)
    return good >= 0.9 * len(told)


def _decodes(line: bytes, *, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _beginning(path: Path, size: int) -> bytes:
    """The first bytes of a file, decompressed; fewer if it is shorter or damaged, which reading it will tell."""
    import zstandard

    sample = b""
    try:
        for block in _blocks(path):
            sample += block
            if len(sample) >= size:
                break
    except (zlib.error, zstandard.ZstdError, EOFError):
        pass
    return sample[:size]


def _in_utf8(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii"):
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for block in blocks:
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


class _Decoder(Protocol):
    """The interface that zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, in pieces that are small however well it is compressed."""
    for block in _decompressed(path):
        yield from [block] if len(block) <= PIECE else (block[place : place + PIECE] for place in range(0, len(block), PIECE))


def _decompressed(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file; EOFError if it ends too early (`zstandard.open` would not notice)."""
    import zstandard

    decoders: dict[str, Callable[[], _Decoder]] = {
        ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: gzip header, and the checksum is verified
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj(),
    }
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if suffix not in decoders:
            while data := file.read(READ[""]):
                yield data
            return
        decoder, size, most = decoders[suffix](), 0, LEAST_TEXT + MOST_TIMES * path.stat().st_size
        while data := file.read(READ[suffix]):
            while data:
                if decoder.eof:  # another member of the same file, or zeros that fill it up, as on tapes
                    if not (data := data.lstrip(b"\0")):
                        break
                    decoder = decoders[suffix]()
                yield (block := decoder.decompress(data))
                if (size := size + len(block)) > most:
                    raise InputError(f"{path}: expected text of at most {MOST_TIMES} times the size of the file, got more")
                data = decoder.unused_data
        if not decoder.eof:
            raise EOFError("it ends too early")
