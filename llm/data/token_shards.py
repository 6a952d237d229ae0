"""Tokenized documents on disk: written once shard by shard, then read where they lie.

A folder holds `shard-00000.bin` and so on, the ids of whole documents end to end, and beside each a `.npy` table with one
DOCUMENT per document. A shard with a table is complete, so after a kill the writer continues after the last one;
`sources.json` has the names of the sources that the tables number, and `meta.json` is written last, when all shards are
complete. `llm.data.token_rows` makes rows of a model's context from such a folder. Ids are uint16 if the vocabulary fits, else
uint32.

A reader keeps a few numbers per shard in memory and none per document: 100 GB of text may have 250 million. It maps the tables
and reads the tokens by `pread`, which lets other threads run while a disk is slow.
"""

import json
import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llm.files import whole_file, write_text

META, SOURCES = "meta.json", "sources.json"
SHARD_TOKENS = 2**26  # 128 MiB of uint16: few files for a large corpus, little to repeat after a crash
DOCUMENT = np.dtype(  # one row of a shard's table
    [
        ("start", "<u4"),  # its first token, counted from the start of the shard
        ("tokens", "<u4"),
        ("bytes", "<u4"),  # of text
        ("passes", "<u2"),  # how often an epoch of training sees it
        ("source", "<u2"),
    ]
)
Documents = NDArray[np.void]  # of DOCUMENT


class TokenWriter:
    """Writes documents into shards. After a stop, a new writer continues after its first `documents` documents."""

    def __init__(self, folder: Path, *, vocab_size: int, context: int, padding: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._about: dict[str, Any] = {"vocab_size": vocab_size, "context": context, "padding": padding}
        self._shard_tokens = shard_tokens
        self._shards = [shard_facts(np.load(path)) for path in _tables(folder)]  # of complete ones
        names = folder / SOURCES
        self._sources: list[str] = json.loads(names.read_text(encoding="utf-8")) if names.exists() else []
        self._known_sources = len(self._sources)  # on disk
        self.documents, self.tokens, self.bytes = (self._total(name) for name in ("documents", "tokens", "bytes"))
        self._table: list[tuple[int, int, int, int, int]] = []
        self._tokens_in_shard = 0
        self._open_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, ids: Sequence[int], *, passes: int, text_bytes: int, source: str = "") -> None:
        """Add one document. A shard ends before a document that does not fit into it."""
        if self._table and self._tokens_in_shard + len(ids) > self._shard_tokens:
            self._close_shard()
            self._open_shard()
        if source not in self._sources:
            self._sources.append(source)
        self._file.write(np.array(ids, dtype=self._dtype).data)
        self._table.append((self._tokens_in_shard, len(ids), text_bytes, passes, self._sources.index(source)))
        self._tokens_in_shard += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += text_bytes

    def finish(self) -> dict[str, Any]:
        """Close the last shard and write `meta.json`, which makes the folder complete; returns its content."""
        if self._table:
            self._close_shard()
        else:
            self._file.close()
            self._shard_path().unlink()
            if not self._shards:
                self._write_sources()
        totals = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        totals["epoch_tokens"] = self._total("epoch_tokens")
        meta = self._about | {"dtype": self._dtype.name} | totals | {"shards": self._shards}
        write_text(self._folder / META, json.dumps(meta, indent=2) + "\n")
        return meta

    def _total(self, name: str) -> int:
        return sum(facts[name] for facts in self._shards)

    def _shard_path(self) -> Path:
        return self._folder / f"shard-{len(self._shards):05}.bin"

    def _open_shard(self) -> None:
        self._file = self._shard_path().open("wb", buffering=2**20)

    def _close_shard(self) -> None:
        self._file.close()
        if len(self._sources) != self._known_sources:
            self._write_sources()  # before the table that needs them
        table = np.array(self._table, dtype=DOCUMENT)
        with whole_file(self._shard_path().with_suffix(".npy")) as temporary, temporary.open("wb") as file:
            np.save(file, table)
        self._shards.append(shard_facts(table))
        self._table = []
        self._tokens_in_shard = 0

    def _write_sources(self) -> None:
        write_text(self._folder / SOURCES, json.dumps(self._sources, ensure_ascii=False) + "\n")
        self._known_sources = len(self._sources)


class TokenShards:
    """The documents of a complete folder."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / META).read_text())
        self.vocab_size: int = meta["vocab_size"]
        self.context: int = meta["context"]  # tokens in a row, by default
        self.padding: int = meta["padding"]  # id of the padding token
        self.tokens: int = meta["tokens"]
        self.bytes: int = meta["bytes"]  # of text, over all documents
        self.epoch_tokens: int = meta["epoch_tokens"]  # with each document as often as its passes
        self.sources: list[str] = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
        self.documents_of: list[int] = [facts["documents"] for facts in meta["shards"]]  # per shard
        self.most_passes: list[int] = [facts["most_passes"] for facts in meta["shards"]]  # of a document, per shard
        self.first_documents = np.cumsum([0, *self.documents_of])  # (shards + 1,)
        self._dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self._paths = _tables(folder)
        _allow_files(2 * len(self._paths))
        self._tables = [_mapped(path) for path in self._paths]
        self._token_files = [os.open(path.with_suffix(".bin"), os.O_RDONLY | os.O_CLOEXEC) for path in self._paths]

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.first_documents[-1])

    def __del__(self) -> None:
        """Close the files."""
        for file in getattr(self, "_token_files", ()):
            os.close(file)

    def table(self, shard: int, first: int = 0, count: int | None = None) -> Documents:
        """`count` documents of a shard, from its document `first` on; by default all."""
        count = self.documents_of[shard] - first if count is None else count
        with self._paths[shard].open("rb") as file:  # not through the map, so that other threads run meanwhile
            read = _read(file.fileno(), count * DOCUMENT.itemsize, self._place(shard, first))
        return np.frombuffer(read, dtype=DOCUMENT)

    def look_up(self, documents: NDArray[np.int64]) -> tuple[Documents, NDArray[np.int64]]:
        """The DOCUMENT of each of a few documents, and the shard of each."""
        shards = np.searchsorted(self.first_documents, documents, side="right") - 1
        inside = documents - self.first_documents[shards]
        read = bytearray()
        for shard, document in zip(shards.tolist(), inside.tolist(), strict=True):
            place = self._place(shard, document)
            read += self._tables[shard][place : place + DOCUMENT.itemsize]
        return np.frombuffer(read, dtype=DOCUMENT), shards

    def _place(self, shard: int, document: int) -> int:
        """Where a document is in the file of its shard's table, which ends with the last one."""
        return len(self._tables[shard]) - (self.documents_of[shard] - document) * DOCUMENT.itemsize

    def read(self, shard: int, first: int, count: int) -> NDArray[np.int64]:
        """`count` tokens of a shard, from its token `first` on."""
        size = self._dtype.itemsize
        return np.frombuffer(_read(self._token_files[shard], count * size, first * size), dtype=self._dtype).astype(np.int64)

    def document(self, index: int) -> NDArray[np.int64]:
        """The ids of one document."""
        (found,), (shard,) = self.look_up(np.array([index]))
        return self.read(int(shard), int(found["start"]), int(found["tokens"]))


def shard_facts(table: Documents) -> dict[str, int]:
    """What a reader has to know of a shard before it reads its table."""
    tokens, passes = table["tokens"].astype(np.int64), table["passes"].astype(np.int64)
    return {
        "documents": len(table),
        "tokens": int(tokens.sum()),
        "bytes": int(table["bytes"].sum(dtype=np.int64)),
        "epoch_tokens": int(tokens @ passes),
        "most_passes": int(passes.max(initial=0)),
    }


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npy"))


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read(file: int, size: int, offset: int) -> bytes:
    """`size` bytes; one call of `pread` gives at most 2 GiB."""
    parts = []
    while size > 0:
        part = os.pread(file, size, offset)
        if not part:
            raise OSError(f"expected {size} more bytes at {offset} of a file of tokens, got its end: it was cut short")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _allow_files(count: int) -> None:
    """Let this process have `count` more files open: the usual limit of 1,024 is that of the shards of 100 GB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # above the hard limit; opening then says what is missing
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
