"""The work on one shard, as a pure function: parse, clean, drop, hash and sign its rows, and write the result to a folder.

It looks at no other shard, so the result for a document does not depend on how rows were cut into shards. A folder under its
final name is complete, and a later run with the same rows and config reuses it.
"""

import hashlib
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.errors import InputError
from llm.files import whole_folder
from llm.text import minhash
from llm.text.attribution import Attribution
from llm.text.cleaning import Rules, drop_reason, prepared
from llm.text.readers.rows import FileRow
from llm.text.selection import passes, share_of
from llm.text.sources import Shard, Source
from llm.text.templates import split_text, text_of

BATCH = 1 << 18  # characters signed together: enough to hide Python's overhead, few enough for the CPU's cache
EXAMPLES = 5  # bad rows quoted in the record

FACTS = np.dtype(
    [
        ("characters", np.uint32),
        ("bytes", np.uint32),
        ("passes", np.uint32),
        ("validation", np.bool_),
        ("attribution", np.uint32),  # index into the shard's list of attributions
    ]
)


@dataclass(frozen=True)
class CorpusConfig:
    """How documents are cleaned, split and deduplicated, in all sources."""

    rules: Rules = field(default_factory=Rules)
    validation: float = 0.01  # share of the documents that is held out
    similarity: float | None = 0.8  # at which a later document is a near duplicate; None keeps near duplicates
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class ShardFolder:
    """The result of one shard on disk. Line i of the documents, row i of the facts and column i of the hashes correspond."""

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Counts (read, dropped by reason, documents), bad rows, attributions."""
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def documents(self) -> bytes:
        """Lines of the corpus, UTF-8."""
        return (self.folder / "documents.jsonl").read_bytes()

    def facts(self) -> NDArray[np.void]:
        """One FACTS per document."""
        facts: NDArray[np.void] = np.load(self.folder / "facts.npy")
        return facts

    def digest(self, half: int) -> minhash.Hashes:
        """The first or second 64 bits of the hash of each document."""
        return np.array(np.load(self.folder / "digests.npy", mmap_mode="r")[half])

    def band(self, band: int) -> minhash.Hashes:
        """The hash of one band of each document."""
        return np.array(np.load(self.folder / "bands.npy", mmap_mode="r")[band])

    def signatures(self) -> NDArray[np.uint8]:
        """(documents, SLOTS)."""
        signatures: NDArray[np.uint8] = np.load(self.folder / "signatures.npy")
        return signatures


def process_shard(shard: Shard, *, sources: list[Source], config: CorpusConfig, folder: Path) -> ShardFolder:
    """Process a shard into `folder`, unless the result of the same rows and config is there."""
    source = replace(sources[shard.source], files=(), rows=None)
    target = folder / f"{shard.index:06d}"
    work = pickle.dumps((shard.rows, repr(source), repr(config), minhash.SEED))
    identity = hashlib.blake2b(work, digest_size=16).hexdigest()
    if target.exists():
        if ShardFolder(target).summary["identity"] == identity:
            return ShardFolder(target)
        shutil.rmtree(target)
    with whole_folder(target) as temporary:
        summary = _write(temporary, shard.rows, source, config)
        (temporary / "summary.json").write_text(json.dumps({"identity": identity, "source": shard.source, **summary}))
    return ShardFolder(target)


def _write(folder: Path, rows: list[FileRow], source: Source, config: CorpusConfig) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    bad_rows: list[str] = []
    attributions: dict[Attribution, int] = {}
    facts: list[tuple[int, int, int, bool, int]] = []
    digests: list[bytes] = []
    texts: list[str] = []
    parts = split_text(source.text)
    with (folder / "documents.jsonl").open("wb") as documents:
        for row in rows:
            try:
                fields = row.fields()
                if not all(fields.get(name) == value for name, value in source.where.items()):
                    dropped["filtered"] += 1
                    continue
                text = prepared(text_of(fields, parts), rules=config.rules)
            except InputError as error:
                if not config.skip_bad_rows:
                    raise InputError(f"{row.at}: {error}") from error
                dropped["bad_row"] += 1
                bad_rows.append(f"{row.at}: {error}")
                continue
            encoded = text.encode()
            if reason := drop_reason(text, encoded, rules=config.rules):
                dropped[reason] += 1
                continue
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            held_out = share_of(digest[:8]) < config.validation
            times = passes(source.weight, share_of(digest[8:]))
            if not times:
                dropped["unselected"] += 1
                continue
            attribution = Attribution.of(fields)
            attribution = attribution._replace(language=attribution.language or source.language)
            times = 1 if held_out else times
            documents.write(_line(text, source.name, times, attribution.language))
            number = attributions.setdefault(attribution, len(attributions))
            facts.append((len(text), len(encoded), times, held_out, number))
            digests.append(digest)
            texts.append(text)
    np.save(folder / "facts.npy", np.array(facts, dtype=FACTS))
    _write_hashes(folder, texts, digests, similarity=config.similarity)
    return {
        "read": len(rows),
        "documents": len(texts),
        "dropped": dropped,
        "bad_rows": bad_rows[:EXAMPLES],
        "attributions": list(attributions),
    }


def _write_hashes(folder: Path, texts: list[str], digests: list[bytes], *, similarity: float | None) -> None:
    hashes = np.ascontiguousarray(np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2).T)
    np.save(folder / "digests.npy", hashes)
    if similarity is not None:
        signed = np.zeros((len(texts), minhash.SLOTS), dtype=np.uint32)
        for start, stop in _batches(texts):
            signed[start:stop] = minhash.signatures(texts[start:stop], hashes[0, start:stop])
        bands, rows_per_band = minhash.banding(similarity)
        np.save(folder / "bands.npy", minhash.band_hashes(signed, bands=bands, rows=rows_per_band))
        np.save(folder / "signatures.npy", minhash.low_bytes(signed))


def _line(text: str, source: str, passes: int, language: str | None) -> bytes:
    document: dict[str, Any] = {"text": text, "source": source, "passes": passes}
    if language is not None:
        document["language"] = language
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def _batches(texts: list[str]) -> Iterator[tuple[int, int]]:
    start = size = 0
    for stop, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH or stop == len(texts):
            yield start, stop
            start, size = stop, 0
