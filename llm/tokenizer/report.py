"""Measures a tokenizer on text, for its record: bytes per token, unknown bytes, lengths against other tokenizers."""

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llm.text.documents import Document, sample_documents
from llm.text.selection import hash_share
from llm.tokenizer.tokenizer import TextTokenizer

MEASURED_BYTES = 4_000_000  # of text; two halves of that much differed by under 1% in bytes per token
SENTENCES = 1000
_SENTENCE = re.compile(r"[^\n。！？!?.]+[。！？!?.]*[”’」』\"')]*[^\S\n]?|[。！？!?.]+")


def measured_documents(validation: Path, train: Path, *, size: int = MEASURED_BYTES) -> list[Document]:
    """Documents to measure on: held-out ones chosen by hash, and training documents if these are too few."""
    documents = list(sample_documents(validation, size))
    missing = size - validation.stat().st_size
    if missing > 0:
        documents += sample_documents(train, missing)
    return documents


def sample_sentences(documents: Sequence[Document], count: int = SENTENCES) -> list[str]:
    """The `count` sentences of the documents with the smallest hashes, or all if there are fewer."""
    sentences = {found for document in documents for found in _SENTENCE.findall(document.text) if found.strip()}
    return heapq.nsmallest(count, sentences, key=lambda sentence: (hash_share(sentence), sentence))


def report(
    tokenizer: TextTokenizer,
    documents: Sequence[Document],
    *,
    english_only: TextTokenizer | None,
    others: Mapping[str, Tokenizer],
) -> dict[str, Any]:
    """The measurements for the record of `tokenizer`, as JSON.

    `sequence_length` holds ratios, by language and for all text: tokens of this tokenizer per byte, per token of the
    English-only tokenizer (null if there is none) and per token of each of `others`; below 1 is shorter.
    """
    texts = [document.text for document in documents]
    languages = [document.language for document in documents]
    sizes = _by_language(languages, [document.bytes for document in documents])
    tokens = _by_language(languages, [len(ids) for ids in tokenizer.encode_batch(texts)])
    against: dict[str, Any] = {"bytes": _ratios(tokens, sizes), "english_only": None}
    if english_only is not None:
        theirs = _by_language(languages, [len(ids) for ids in english_only.encode_batch(texts)])
        against["english_only"] = _ratios(tokens, theirs) | {"vocab_size": english_only.vocab_size}
    for name, other in others.items():
        encodings = other.encode_batch_fast(texts, add_special_tokens=False)
        theirs = _by_language(languages, [len(encoding.ids) for encoding in encodings])
        against[name] = _ratios(tokens, theirs) | {"vocab_size": other.get_vocab_size()}
    return {
        "measured": {"documents": len(documents), "bytes": sizes},
        "bytes_per_token": _ratios(sizes, tokens),
        "sequence_length": against,
        **_faults(tokenizer, sample_sentences(documents)),
    }


def _faults(tokenizer: TextTokenizer, sentences: Sequence[str]) -> dict[str, Any]:
    """Losses between text and ids: bytes that no token stands for, and sentences that do not decode to themselves."""
    encoded = tokenizer.encode_batch(sentences)
    size = sum(len(sentence.encode()) for sentence in sentences)
    spelled = sum(map(tokenizer.spelled_bytes, encoded))
    failures = sum(tokenizer.decode(ids) != sentence for ids, sentence in zip(encoded, sentences, strict=True))
    return {
        "unknown_rate": (size - spelled) / max(size, 1),  # of bytes; a byte-level vocabulary has none by construction
        "round_trip": {"sentences": len(sentences), "failures": failures},
    }


def _by_language(languages: Sequence[str], amounts: Sequence[int]) -> dict[str, int]:
    sums: Counter[str] = Counter({"all": sum(amounts)})
    for language, amount in zip(languages, amounts, strict=True):
        sums[language] += amount
    return dict(sorted(sums.items()))


def _ratios(amounts: Mapping[str, int], units: Mapping[str, int]) -> dict[str, float]:
    return {name: round(amounts[name] / units[name], 4) for name in amounts if units[name]}
