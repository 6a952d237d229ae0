"""MinHash signatures: an estimate of how similar two documents are, from 128 bytes each.

A text becomes a set of shingles, runs of five tokens. A token is a word in scripts that put spaces between words and a single
character in others (Chinese, Japanese, Thai), so that one rule works for mixed text. The signature of the set estimates the
Jaccard similarity of two sets (Broder 1997); equal bands of it find the pairs to compare. `rensa` computes signatures; numpy
hashes the shingles of a whole batch at once, which is fast.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SLOTS = 128  # of a signature: the standard error is sqrt(J (1 - J) / 128), 0.035 at a similarity of 0.8
SEED = 1  # of the hash functions; not configurable, because only signatures of one seed can be compared
SHINGLE = 5  # tokens
RECALL = 0.99  # at least this share of the pairs exactly at `similarity` share a band

_SPACE, _LETTER, _ALONE = 0, 1, 2  # classes of characters
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x312F),  # Kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
)


def banding(similarity: float) -> tuple[int, int]:
    """Bands and rows per band: the longest (most selective) bands that find RECALL of the pairs at `similarity`."""
    for rows in range(16, 1, -1):
        bands = SLOTS // rows
        if 1 - (1 - similarity**rows) ** bands >= RECALL:
            return bands, rows
    return SLOTS, 1


def signatures(texts: Sequence[str], fallback: Hashes) -> NDArray[np.uint32]:
    """One signature per text, (texts, SLOTS). The only shingle of a text without words is its hash in `fallback`."""
    import rensa

    shingles, offsets = shingle_hashes(texts, fallback)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, SLOTS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), SLOTS)


def band_hashes(signatures: NDArray[np.uint32], *, bands: int, rows: int) -> Hashes:
    """One hash per band and text, (bands, texts): equal if all `rows` slots of the band are equal."""
    slots = signatures[:, : bands * rows].reshape(len(signatures), bands, rows)
    hashes: Hashes = np.zeros(slots.shape[:2], dtype=np.uint64)
    for row in range(rows):
        hashes = _mix(hashes ^ slots[:, :, row])
    return np.ascontiguousarray(hashes.T)


def low_bytes(signatures: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The low byte of each slot: an estimate as good, in a quarter of the memory (Li and König 2010); see `equal_slots`."""
    return signatures.astype(np.uint8)


def equal_slots(similarity: float) -> float:
    """Share of equal low bytes of two texts of this similarity: slots that differ have equal low bytes once in 256."""
    return similarity + (1 - similarity) / 256


def shingle_hashes(texts: Sequence[str], fallback: Hashes) -> tuple[Hashes, NDArray[np.int64]]:
    """The shingles of all texts end to end, and where those of each text begin (texts + 1 offsets)."""
    lowered = [text.lower() for text in texts]
    ends = np.cumsum([len(text) + 1 for text in lowered])
    points = np.frombuffer("\n".join([*lowered, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    tokens, positions = _tokens(points)
    last = np.searchsorted(positions, ends)  # texts: one past its last token
    first = np.concatenate([[0], last[:-1]])
    index = np.arange(len(tokens))
    end = np.repeat(last, last - first)  # tokens: where the text of this token ends
    hashes = tokens.copy()
    for ahead in range(1, SHINGLE):
        following = np.concatenate([tokens[ahead:], np.zeros(min(ahead, len(tokens)), dtype=np.uint64)])
        hashes = _mix(hashes) + np.where(index + ahead < end, following, np.uint64(0))
    # A text with fewer tokens than a shingle is one shingle.
    kept = (index + SHINGLE <= end) | (index == np.repeat(first, last - first))
    counts = np.where(last > first, np.maximum(last - first - SHINGLE + 1, 1), 0)
    wordless = np.flatnonzero(counts == 0)
    hashes = np.insert(hashes[kept], np.cumsum(counts)[wordless], fallback[wordless])
    counts[wordless] = 1
    return hashes, np.concatenate([[0], np.cumsum(counts)])


def _tokens(points: NDArray[np.uint32]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the tokens in a run of code points, and the position of each one's first character."""
    classes = _classes()[np.minimum(points, 0xFFFF)]
    inside = np.flatnonzero(classes)
    starts = classes == _ALONE
    starts[0] |= classes[0] == _LETTER
    starts[1:] |= (classes[1:] == _LETTER) & (classes[:-1] != _LETTER)
    begin = np.flatnonzero(starts[inside])  # in `inside`, of each token
    lengths = np.diff(begin, append=len(inside))
    offset = np.arange(len(inside)) - np.repeat(begin, lengths)  # of a character in its token
    characters = _mix(points[inside].astype(np.uint64) + (offset.astype(np.uint64) << np.uint64(32)))
    tokens = np.add.reduceat(characters, begin) if len(begin) else np.zeros(0, dtype=np.uint64)
    return tokens, inside[begin]


def _mix(values: Hashes) -> Hashes:
    """A bijection that spreads every bit over the word: splitmix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@cache
def _classes() -> NDArray[np.uint8]:
    """The class of each code point up to U+FFFF; U+FFFF stands for all code points above it (Han, emoji): a token each."""
    classes = np.array([unicodedata.category(chr(point))[0] in "LMN" for point in range(0x10000)], dtype=np.uint8)
    for low, high in _UNSPACED:
        classes[low : high + 1] *= _ALONE
    classes[0xFFFF] = _ALONE
    return classes
