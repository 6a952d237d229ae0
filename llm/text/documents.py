"""Reads the documents of a cleaned corpus, one JSON object a line. `llm.text.corpus` writes it.

A cleaned corpus is our own file, so its lines are trusted. The hash of a document's text decides whether a sample has it, so
adding a document moves no other in or out.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm.text.selection import hash_share

SCRIPT_SAMPLE = 1000  # characters at the start of a document that decide its language
_KANA = "ja"
_SCRIPTS = {
    "zh": r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]",
    _KANA: r"[\u3041-\u30ff\u31f0-\u31ff]",
    "ko": r"[\uac00-\ud7a3\u1100-\u11ff]",
    "en": r"[A-Za-z]",
    "latin": r"[\u00c0-\u024f\u1e00-\u1eff]",
    "cyrillic": r"[\u0400-\u052f]",
    "greek": r"[\u0370-\u03ff]",
    "arabic": r"[\u0600-\u06ff\u0750-\u077f]",
    "hebrew": r"[\u0590-\u05ff]",
    "devanagari": r"[\u0900-\u097f]",
    "thai": r"[\u0e00-\u0e7f]",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _SCRIPTS.items()}


@dataclass(frozen=True)
class Document:
    """One document of a cleaned corpus."""

    text: str
    passes: int  # how often an epoch of training sees it
    told_language: str | None  # the language that its source gives
    line_bytes: int  # length of its line in the file, for progress
    source: str = ""

    @cached_property
    def language(self) -> str:
        """The language that its source gives, else the one of its script."""
        return self.told_language or language_by_script(self.text)

    @cached_property
    def bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of `path` in order, one at a time."""
    with path.open("rb") as lines:
        for line in lines:
            row = json.loads(line)
            yield Document(row["text"], row["passes"], row.get("language"), len(line), row.get("source", ""))


def sample_documents(path: Path, size: int) -> Iterator[Document]:
    """About `size` bytes of the documents of `path`, in order: those with the smallest hash shares."""
    share = size / max(path.stat().st_size, 1)
    return (document for document in read_documents(path) if hash_share(document.text) < share)


def language_by_script(text: str) -> str:
    """The language of most letters: Chinese for Han, English for plain Latin, else the name of the script.

    A Han character counts as three letters, as in UTF-8; a tenth of kana makes a text Japanese. An accented letter counts 50
    times for "latin", since English has none and other Latin languages have few.
    """
    beginning = text[:SCRIPT_SAMPLE]
    counts = {name: len(pattern.findall(beginning)) for name, pattern in _PATTERNS.items()}
    if counts[_KANA] * 10 > counts["zh"] and counts[_KANA] * 3 > counts["en"]:
        return _KANA
    weights = counts | {"zh": counts["zh"] * 3, "ko": counts["ko"] * 2, "latin": counts["latin"] * 50}
    best = max(weights, key=lambda name: weights[name])
    return best if counts[best] else "other"
