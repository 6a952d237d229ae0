"""The kind `pack`: a corpus as token ids, in memory-mapped shards with the ends of documents."""

import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from runner.artifacts import Corpus, Tokenizer, Tokens
from runner.stage import Context, Metrics, Ref, Semantic, Stage
from runner.stages.checkpoint import TOKENIZER

if TYPE_CHECKING:
    from llm.text.documents import Document
    from llm.tokenizer.tokenizer import TextTokenizer

BATCH_BYTES = 4 * 2**20  # of lines that are tokenized at once: enough for many cores; takes about 30 times as much memory


class Pack(Stage, kind="pack", version=3, makes=Tokens):
    """Tokenizes the training and the validation documents of a corpus. Every document ends with the end token."""

    corpus: Semantic[Ref[Corpus]]
    """The text to tokenize."""
    tokenizer: Semantic[Ref[Tokenizer]]
    """The tokenizer, or a checkpoint that has one, for a training that continues from it; a copy is stored with the tokens."""
    context: Semantic[int] = Field(ge=2)
    """Tokens in a training row: documents are concatenated and cut into rows of this length."""

    def run(self, context: Context) -> Metrics:
        """Tokenize the documents that are not tokenized yet."""
        from llm.errors import InputError
        from llm.tokenizer.tokenizer import TextTokenizer

        corpus, source, tokens = context.open(self.corpus), context.open(self.tokenizer), Tokens(context.work)
        tokenizer = TextTokenizer.load(source.folder)
        metrics = {
            split: self._pack(context, tokenizer, documents, folder)
            for split, documents, folder in (
                ("validation", corpus.validation, tokens.validation),
                ("train", corpus.train, tokens.train),
            )
        }
        if not metrics["train"]["tokens"]:
            raise InputError(f"corpus {str(self.corpus)!r}: expected at least one training document, got none")
        tokens.tokenizer.folder.mkdir(exist_ok=True)
        for file in (source.folder / name for name in TOKENIZER):
            if file.exists():
                shutil.copy2(file, tokens.tokenizer.folder / file.name)
        return metrics

    def _pack(self, context: Context, tokenizer: "TextTokenizer", documents: Path, folder: Path) -> dict[str, Any]:
        """Write the documents of one split into `folder`; returns its metrics."""
        from llm.data.token_shards import TokenWriter
        from llm.errors import Interrupted
        from llm.text.documents import read_documents

        start = time.monotonic()
        size = documents.stat().st_size
        with TokenWriter(folder, vocab_size=tokenizer.vocab_size, context=self.context, padding=tokenizer.padding) as writer:
            remaining = read_documents(documents)
            done = sum(document.line_bytes for document in islice(remaining, writer.documents))
            had = writer.tokens
            for batch in _batches(remaining):
                if context.should_stop():
                    raise Interrupted
                for document, ids in zip(
                    batch, tokenizer.encode_documents([document.text for document in batch]), strict=True
                ):
                    writer.append(ids, passes=document.passes, text_bytes=document.bytes, source=document.source)
                    done += document.line_bytes
                context.report(done=done, total=size, unit="bytes")
            written = writer.finish()
        speed = round((writer.tokens - had) / (time.monotonic() - start), 1)
        return {name: written[name] for name in ("documents", "tokens", "bytes")} | {"tokens_per_second": speed}


def _batches(documents: "Iterator[Document]") -> "Iterator[list[Document]]":
    """Lists of documents of about BATCH_BYTES each."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.line_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
