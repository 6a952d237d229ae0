"""The kind `tokenizer`: a byte-level BPE, trained on a sample of a corpus and measured on held-out text."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import Self

from pydantic import Field, model_validator

from llm.tokenizer.chat_template import SPECIAL_TOKENS
from llm.tokenizer.pretokenizers import BYTES, PreTokenizerName
from runner.artifacts import Corpus, Tokenizer
from runner.input_files import InputFile
from runner.stage import Context, Metrics, Ref, Semantic, Stage

MAX_SPECIAL_TOKENS = 50  # more is a mistake: they are not learned as text, and each takes a row of the embedding


class TrainTokenizer(Stage, kind="tokenizer", version=1, makes=Tokenizer):
    """Trains a byte-level BPE on a corpus. It has a chat template and opens in Transformers."""

    corpus: Semantic[Ref[Corpus]]
    """The text to train on; only its training documents are used for that."""
    vocab_size: Semantic[int] = Field(gt=0)
    """Number of tokens: 256 bytes, the special tokens, and merged pairs for the rest."""
    min_frequency: Semantic[int] = Field(2, ge=1)
    """How often a pair of tokens must occur to be merged."""
    special_tokens: Semantic[list[str]] = Field(default_factory=list)
    """More special tokens, after <|begin|>, <|end|>, <|pad|>, <|system|>, <|user|> and <|assistant|>; at most 50 in all."""
    pre_tokenizer: Semantic[PreTokenizerName] = "qwen2"
    """How text is split into words, by llama.cpp's name. "qwen2" and "smollm" split off each digit, "llama-bpe" and
    "deepseek-v3" split numbers in threes, and "deepseek-v3" separates Chinese from other letters."""
    sample_bytes: Semantic[int] = Field(64_000_000, gt=0)
    """Approximate size of the sample to train on; documents are chosen by hash. Each byte of Chinese takes about 100 bytes of
    memory, because Chinese is not split into words; each byte of English takes a few."""
    compare_with: Semantic[list[InputFile]] = Field(default_factory=list)
    """Files tokenizer.json of other models, with whose sequence lengths the record compares."""

    @model_validator(mode="after")
    def _special_tokens_fit(self) -> Self:
        if found := [token for token in self.special_tokens if not token.strip() or token in SPECIAL_TOKENS]:
            raise ValueError(f"special_tokens: expected tokens that are not empty and not built in, got {found[0]!r}")
        if twice := [token for token in self.special_tokens if self.special_tokens.count(token) > 1]:
            raise ValueError(f"special_tokens: expected each token once, got {twice[0]!r} twice")
        specials = len(SPECIAL_TOKENS) + len(self.special_tokens)
        if specials > MAX_SPECIAL_TOKENS:
            raise ValueError(f"special_tokens: expected at most {MAX_SPECIAL_TOKENS} in all, got {specials}")
        if self.vocab_size < BYTES + specials:
            raise ValueError(
                f"vocab_size: expected at least {BYTES + specials}, for {BYTES} bytes and {specials} special tokens, "
                f"got {self.vocab_size}"
            )
        return self

    def run(self, context: Context) -> Metrics:
        """Train, save and measure the tokenizer."""
        from llm.tokenizer.files import open_tokenizer
        from llm.tokenizer.report import measured_documents, report
        from llm.tokenizer.train_bpe import train_bpe

        corpus = context.open(self.corpus)
        others = {str(path): open_tokenizer(path) for file in self.compare_with for path in file.fetched()}
        context.report(note="counting words and merging pairs")
        sampled: Counter[str] = Counter()
        learn = partial(
            train_bpe,
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            pre_tokenizer_name=self.pre_tokenizer,
            special_tokens=self.special_tokens,
        )
        tokenizer = learn(self._texts(context, sampled))
        english_only = None
        if 0 < sampled["en"] < sampled.total():
            context.report(note="training an English-only tokenizer of the same size for comparison")
            english_only = learn(self._texts(context, Counter(), language="en"), allow_smaller=True)
        tokenizer.save(context.work)
        context.report(note="measuring")
        measured = measured_documents(corpus.validation, corpus.train)
        return {
            "vocab_size": tokenizer.vocab_size,
            "sample_bytes": dict(sorted(sampled.items())),
            **report(tokenizer, measured, english_only=english_only, others=others),
        }

    def _texts(self, context: Context, sampled: Counter[str], *, language: str | None = None) -> Iterator[str]:
        """The documents of the sample, each repeated for its passes; `sampled` counts bytes by language."""
        from llm.errors import InputError, Interrupted
        from llm.text.documents import sample_documents

        train = context.open(self.corpus).train
        for document in sample_documents(train, self.sample_bytes):
            if context.should_stop():
                raise Interrupted
            if language in (None, document.language):
                sampled[document.language] += document.bytes
                yield from repeat(document.text, document.passes)
        if not sampled:
            raise InputError(
                f"corpus {str(self.corpus)!r}: expected documents in a sample of {self.sample_bytes:,} bytes out of "
                f"{train.stat().st_size:,}, got none; increase sample_bytes if documents are long"
            )
