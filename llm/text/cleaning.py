"""Cleaning of one document: normalized characters, bounds on its length, no repetition, and what a recipe asks for besides.

Pure functions of one text. `llm.text.deduplication` finds duplicates between documents.
"""

import re
import unicodedata
import zlib
from dataclasses import dataclass

from llm.text.language import language_of
from llm.text.personal import PersonalKind, redact
from llm.text.quality import RuleSet, failed_rule, keep_prose

# \r, the other controls that end a line, and Unicode's two separators
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
# Controls except \t and \n; surrogates, which JSON can hold and UTF-8 cannot; the byte order mark; noncharacters
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufdd0-\ufdef\ufffe\uffff]+")
# Any match of either
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Rules:
    """Thresholds for keeping a document. Lengths are in characters after cleaning."""

    min_characters: int = 20
    max_characters: int = 5_000_000  # the longest novels; longer is a dump, and takes much memory to tokenize
    max_repeated_lines: float = 0.4  # share of the characters that are in lines which occurred before
    min_compressed: float = 0.1  # size after zlib level 1, as a share of the UTF-8 bytes; prose is at 0.4 to 0.6
    quality: tuple[RuleSet, ...] = ()
    languages: tuple[str, ...] = ()  # ISO 639-1 codes of what is kept; empty for any
    redact: tuple[PersonalKind, ...] = ()


def clean(text: str) -> str:
    """The text in NFC without control characters, with "\\n" at line ends and no white space around it.

    Not NFKC, which turns ，：？ into ASCII and so damages Chinese text.
    """
    if _UNWANTED.search(text):  # rare: one search instead of two saves a tenth of all work on a shard
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text).strip()


def prepared(text: str, *, rules: Rules) -> str:
    """The text as the corpus has it: `clean`, without the lines that C4 drops, and without personal data, where asked."""
    text = clean(text)
    if "c4" in rules.quality:
        text = keep_prose(text)
    return redact(text, rules.redact) if rules.redact else text


def drop_reason(text: str, encoded: bytes, *, rules: Rules) -> str | None:
    """Why a prepared text is dropped: too_short, too_long, repetition, a rule of quality or language; None if it is kept.

    `encoded` is its UTF-8.
    """
    if len(text) < rules.min_characters:
        return "too_short"
    if len(text) > rules.max_characters:
        return "too_long"
    if repeated_line_share(text) > rules.max_repeated_lines or compressed_share(encoded) < rules.min_compressed:
        return "repetition"
    if rules.quality and (failed := failed_rule(text, rules.quality)):
        return failed
    if rules.languages and language_of(text) not in rules.languages:
        return "language"
    return None


def repeated_line_share(text: str) -> float:
    """Share of the characters that are in repeated lines (Rae et al. 2021, Gopher, table A1)."""
    lines = [line for line in text.split("\n") if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    return 1 - sum(map(len, distinct)) / sum(map(len, lines))


def compressed_share(encoded: bytes) -> float:
    """Size after zlib level 1, as a share of the original: small for repetition of any length in any script."""
    return len(zlib.compress(encoded, 1)) / len(encoded)
