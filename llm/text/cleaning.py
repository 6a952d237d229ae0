"""What a document must be to stay: normalized characters, a sane length, and not one thing over and over.

Pure functions of one text. Duplicates between documents are the business of `llm.text.deduplication`.
"""

import re
import unicodedata
import zlib
from dataclasses import dataclass

# \r, the other controls that end a line, and Unicode's two separators
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
# Controls but \t and \n; surrogates, which JSON can smuggle in and UTF-8 cannot hold; the byte order mark; noncharacters
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufdd0-\ufdef\ufffe\uffff]+")
# Whatever either of them finds
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Rules:
    """The thresholds. Lengths are in characters after cleaning."""

    min_characters: int = 20
    max_characters: int = 5_000_000  # the longest novels; more is a dump, and costs the memory of whoever tokenizes it
    max_repeated_lines: float = 0.4  # share of the characters in lines that the document had before
    min_compressed: float = 0.1  # size after zlib level 1, as a share of the UTF-8 bytes; prose is at 0.4 to 0.6


def clean(text: str) -> str:
    """NFC without control characters, every line ended by "\\n", no white space around the whole.

    Never NFKC: it turns ，：？ into ASCII and so damages every Chinese text.
    """
    if _UNWANTED.search(text):  # rare: one look instead of two is a tenth of the whole work
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text).strip()


def fault(text: str, encoded: bytes, *, rules: Rules) -> str | None:
    """Why a cleaned text (and the same in UTF-8) is dropped: too_short, too_long, repetition; None if it stays."""
    if len(text) < rules.min_characters:
        return "too_short"
    if len(text) > rules.max_characters:
        return "too_long"
    if repeated_lines(text) > rules.max_repeated_lines or compressed(encoded) < rules.min_compressed:
        return "repetition"
    return None


def repeated_lines(text: str) -> float:
    """Share of the characters that stand in lines which the text had before (Rae et al. 2021, Gopher, table A1)."""
    lines = [line for line in text.split("\n") if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    return 1 - sum(map(len, distinct)) / sum(map(len, lines))


def compressed(encoded: bytes) -> float:
    """Size after the cheapest zlib, as a share: finds repetition of any length in any script."""
    return len(zlib.compress(encoded, 1)) / len(encoded)
