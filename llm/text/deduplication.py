"""Finds documents that are a copy or a near copy of an earlier one: the merge over all shards.

Of documents that are equal, or whose MinHash signatures are similar enough, the first in source order is kept. One column of
hashes is in memory at a time: eight bytes per document, and as much again for its order. Signatures are read from disk for the
few pairs that share a band. The result depends only on the documents and their order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.text import minhash
from llm.text.shards import ShardFolder

KEPT, EXACT, NEAR = 0, 1, 2
LEADERS = 64  # documents of one band that the others are compared with; without a bound, boilerplate takes quadratic time
PAIRS = 1 << 16  # pairs compared at a time

Indices = NDArray[np.int64]
Alike = Callable[[Indices, Indices], NDArray[np.bool_]]


def find_duplicates(shards: Sequence[ShardFolder], *, similarity: float | None, scratch: Path) -> NDArray[np.uint8]:
    """KEPT, EXACT or NEAR for every document of the shards, in their order."""
    verdicts = np.zeros(sum(shard.summary["documents"] for shard in shards), dtype=np.uint8)
    if len(verdicts):
        _mark_exact(verdicts, shards)
        if similarity is not None:
            _mark_near(verdicts, shards, similarity=similarity, scratch=scratch)
    return verdicts


def _mark_exact(verdicts: NDArray[np.uint8], shards: Sequence[ShardFolder]) -> None:
    first, second = (np.concatenate([shard.digest(half) for shard in shards]) for half in (0, 1))
    _mark(verdicts, first, EXACT, lambda earlier, later: second[earlier] == second[later])


def _mark_near(verdicts: NDArray[np.uint8], shards: Sequence[ShardFolder], *, similarity: float, scratch: Path) -> None:
    path = scratch / "signatures"
    with path.open("wb") as file:
        for shard in shards:
            file.write(shard.signatures().data)
    signatures = np.memmap(path, dtype=np.uint8, mode="r", shape=(len(verdicts), minhash.SLOTS))
    wanted = minhash.equal_slots(similarity) * minhash.SLOTS

    def alike(earlier: Indices, later: Indices) -> NDArray[np.bool_]:
        enough: NDArray[np.bool_] = np.count_nonzero(signatures[earlier] == signatures[later], axis=1) >= wanted
        return enough

    bands, _ = minhash.banding(similarity)
    for band in range(bands):
        _mark(verdicts, np.concatenate([shard.band(band) for shard in shards]), NEAR, alike)


def _mark(verdicts: NDArray[np.uint8], hashes: minhash.Hashes, verdict: int, alike: Alike) -> None:
    """Give `verdict` to each kept document that is `alike` to an earlier one of equal hash."""
    documents = np.flatnonzero(verdicts == KEPT)
    order = np.argsort(hashes[documents], kind="stable")  # groups of equal hash, each in source order
    documents, starts = _repeated(documents[order], hashes[documents[order]])
    for _ in range(LEADERS):
        if not len(documents):
            return
        lengths = np.diff(starts, append=len(documents))
        leaders = np.repeat(documents[starts], lengths)
        follows = np.ones(len(documents), dtype=bool)
        follows[starts] = False
        follower, leader = documents[follows], leaders[follows]
        equal = np.concatenate(
            [alike(leader[at : at + PAIRS], follower[at : at + PAIRS]) for at in range(0, len(follower), PAIRS)]
        )
        verdicts[follower[equal]] = verdict
        # Documents unlike the first of their group are compared with each other in the next round.
        group = np.repeat(np.arange(len(starts)), lengths)[follows][~equal]
        documents, starts = _repeated(follower[~equal], group)


def _repeated(documents: Indices, keys: NDArray[np.int64] | minhash.Hashes) -> tuple[Indices, Indices]:
    """Of documents sorted by key, those whose key occurs more than once, and the start of each key's run."""
    same = keys[1:] == keys[:-1]
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[1:] = same
    repeated[:-1] |= same
    documents, keys = documents[repeated], keys[repeated]
    return documents, np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, dtype=np.int64)
