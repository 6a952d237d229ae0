"""The kind `pack`, run by hand on a small corpus."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import runner.stages.pack
from llm.data.token_shards import TokenShards
from llm.errors import InputError, Interrupted
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe
from runner.artifacts import Tokens
from runner.stage import Context
from runner.stages.pack import Pack

MakeContext = Callable[..., Context]
STAGE = Pack.model_validate({"corpus": "text", "tokenizer": "vocab", "context": 16})
TEXTS = ["Fever and headache.", "发烧，头痛。🙂", "it says <|end|> here", "  spaces\tand\r\nlines  "]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    corpus, vocab = tmp_path / "corpus", tmp_path / "vocab"
    corpus.mkdir()
    write(corpus / "train.jsonl", TEXTS * 2, passes=2)
    write(corpus / "validation.jsonl", TEXTS[::-1])
    train_bpe(TEXTS * 3, 290, min_frequency=2, pre_tokenizer_name="qwen2").save(vocab)
    return {"text": corpus, "vocab": vocab}


def write(path: Path, texts: list[str], passes: int = 1) -> None:
    rows = [json.dumps({"text": text, "source": "s", "passes": passes}, ensure_ascii=False) for text in texts]
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="")


def test_documents_come_back_with_their_begin_and_end(make_context: MakeContext, inputs: dict[str, Path]) -> None:
    context = make_context(inputs=inputs)
    metrics = STAGE.run(context)
    tokens = Tokens(context.work)
    tokenizer = TextTokenizer.load(tokens.tokenizer.folder)
    for folder, texts, passes in ((tokens.train, TEXTS * 2, 2), (tokens.validation, TEXTS[::-1], 1)):
        shards = TokenShards(folder)
        documents = [shards.document(index).tolist() for index in range(len(shards))]
        assert [tokenizer.decode(ids) for ids in documents] == texts
        assert all(ids.count(tokenizer.end) == ids.count(tokenizer.begin) == 1 for ids in documents)
        assert all((ids[0], ids[-1]) == (tokenizer.begin, tokenizer.end) for ids in documents)
        table, _ = shards.look_up(np.arange(len(shards)))
        assert set(table["passes"].tolist()) == {passes}
        assert shards.sources == ["s"]
        assert shards.bytes == sum(len(text.encode()) for text in texts)
        assert (shards.context, shards.vocab_size) == (16, 290)
    train = TokenShards(tokens.train)
    assert metrics["train"]["documents"] == 8
    assert (metrics["train"]["tokens"], metrics["train"]["bytes"]) == (train.tokens, train.bytes)
    assert metrics["train"]["tokens_per_second"] > 0


def test_the_tokenizer_is_copied_unchanged(make_context: MakeContext, inputs: dict[str, Path]) -> None:
    (inputs["vocab"] / "record.json").write_text("{}")
    context = make_context(inputs=inputs)
    STAGE.run(context)
    copied = {file.name: file.read_bytes() for file in Tokens(context.work).tokenizer.folder.iterdir()}
    assert copied == {name: (inputs["vocab"] / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_an_interrupted_packing_ends_with_the_same_content(
    make_context: MakeContext, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.stages.pack, "BATCH_BYTES", 1)  # a document at a time
    whole = make_context("whole", inputs=inputs)
    STAGE.run(whole)
    checks = iter([False] * 7 + [True])
    cut = make_context("cut", inputs=inputs)
    with pytest.raises(Interrupted):
        STAGE.run(dataclasses.replace(cut, should_stop=lambda: next(checks)))
    assert (Tokens(cut.work).validation / "meta.json").exists()
    assert not (Tokens(cut.work).train / "meta.json").exists()
    STAGE.run(cut)
    STAGE.run(cut)  # and once more changes nothing
    assert Tokens(cut.work).digests() == Tokens(whole.work).digests()


def test_known_text_gives_known_tokens(make_context: MakeContext, inputs: dict[str, Path]) -> None:
    # If this changes, the kind's version wants to be raised: the same fields now mean other tokens.
    context = make_context(inputs=inputs)
    STAGE.run(context)
    digests = {name: digest[:16] for name, digest in Tokens(context.work).digests().items() if not name.startswith("tok")}
    assert digests == {
        "train/meta.json": "b6ff044c2decb800",
        "train/shard-00000.bin": "88edeec9cb8c1bc7",
        "train/shard-00000.npy": "8f7708730b67a3c2",
        "train/sources.json": "7e6b026bc2c2d31f",
        "validation/meta.json": "b55e5eb3acd72126",
        "validation/shard-00000.bin": "4761b3194ef3f891",
        "validation/shard-00000.npy": "cafae64f4df86a67",
        "validation/sources.json": "7e6b026bc2c2d31f",
    }


def test_a_corpus_without_held_out_documents_is_packed(make_context: MakeContext, inputs: dict[str, Path]) -> None:
    (inputs["text"] / "validation.jsonl").write_text("")
    context = make_context(inputs=inputs)
    metrics = STAGE.run(context)
    assert metrics["validation"]["documents"] == 0
    assert len(TokenShards(Tokens(context.work).validation)) == 0


def test_a_corpus_without_training_documents_is_refused(make_context: MakeContext, inputs: dict[str, Path]) -> None:
    (inputs["text"] / "train.jsonl").write_text("")
    with pytest.raises(InputError, match="corpus 'text': expected at least one training document, got none"):
        STAGE.run(make_context(inputs=inputs))
