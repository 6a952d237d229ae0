"""The kind `tokenizer`, run by hand on a small corpus."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm.errors import InputError, Interrupted
from llm.tokenizer.tokenizer import TextTokenizer
from runner.artifacts import Tokenizer
from runner.stage import Context
from runner.stages.tokenizer import TrainTokenizer

MakeContext = Callable[..., Context]
ENGLISH = [f"The fever of patient {number} began {number} days ago, and the headache went on." for number in range(60)]
CHINESE = [f"第{number}位患者的发烧始于{number}天前，头痛一直持续。" for number in range(60)]


def make_corpus(folder: Path, train: list[str], validation: list[str] | None = None) -> Path:
    folder.mkdir()
    for name, texts in (("train", train), ("validation", validation or [])):
        rows = [json.dumps({"text": text, "source": "s", "passes": 1}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return folder


def make_stage(**changes: Any) -> TrainTokenizer:
    return TrainTokenizer.model_validate({"corpus": "text", "vocab_size": 320} | changes)


def test_a_bilingual_corpus_gives_a_tokenizer_and_a_report(tmp_path: Path, make_context: MakeContext) -> None:
    corpus = make_corpus(tmp_path / "corpus", ENGLISH + CHINESE, ENGLISH[:3] + CHINESE[:3])
    context = make_context(inputs={"text": corpus})
    metrics = make_stage(special_tokens=["<|tool|>"]).run(context)
    tokenizer = TextTokenizer.load(Tokenizer(context.work).folder)
    assert tokenizer.vocab_size == metrics["vocab_size"] == 320
    assert tokenizer.special_tokens[-1] == "<|tool|>"
    assert metrics["round_trip"]["failures"] == metrics["unknown_rate"] == 0
    assert metrics["bytes_per_token"].keys() == {"all", "en", "zh"}
    assert metrics["sequence_length"]["english_only"]["zh"] < 1 < metrics["sequence_length"]["english_only"]["en"]
    assert {file.name for file in Tokenizer(context.work).content()} == {"tokenizer.json", "tokenizer_config.json"}
    json.dumps(metrics)


def test_the_result_is_the_same_in_another_folder(tmp_path: Path, make_context: MakeContext) -> None:
    corpus = make_corpus(tmp_path / "corpus", ENGLISH + CHINESE)
    contexts = [make_context(name, inputs={"text": corpus}) for name in ("one", "two")]
    for context in contexts:
        make_stage().run(context)
    assert Tokenizer(contexts[0].work).digests() == Tokenizer(contexts[1].work).digests()


def test_known_text_gives_the_known_tokenizer(tmp_path: Path, make_context: MakeContext) -> None:
    # If this changes, the kind's version wants to be raised: the same fields now mean another tokenizer.
    context = make_context(inputs={"text": make_corpus(tmp_path / "corpus", ENGLISH + CHINESE)})
    make_stage().run(context)
    digests = {name: digest[:16] for name, digest in Tokenizer(context.work).digests().items()}
    assert digests == {"tokenizer.json": "2438989849179749", "tokenizer_config.json": "b265547c48755cb8"}


def test_an_english_corpus_is_not_compared_with_an_english_only_tokenizer(tmp_path: Path, make_context: MakeContext) -> None:
    metrics = make_stage(vocab_size=290).run(make_context(inputs={"text": make_corpus(tmp_path / "corpus", ENGLISH)}))
    assert metrics["sequence_length"]["english_only"] is None


def test_another_tokenizer_is_compared_with(tmp_path: Path, make_context: MakeContext) -> None:
    corpus = make_corpus(tmp_path / "corpus", ENGLISH + CHINESE)
    first = make_context("first", inputs={"text": corpus})
    make_stage(vocab_size=270).run(first)
    other = str(Tokenizer(first.work).model)
    metrics = make_stage(compare_with=[other]).run(make_context("second", inputs={"text": corpus}))
    assert metrics["sequence_length"][other]["vocab_size"] == 270
    assert metrics["sequence_length"][other]["all"] < 1


def test_a_document_counts_once_per_pass(tmp_path: Path, make_context: MakeContext) -> None:
    corpus = make_corpus(tmp_path / "corpus", ENGLISH)
    once = make_stage(vocab_size=290).run(make_context("once", inputs={"text": corpus}))
    train = corpus / "train.jsonl"
    train.write_text(train.read_text().replace('"passes": 1', '"passes": 3'))
    thrice = make_stage(vocab_size=290, min_frequency=6).run(make_context("thrice", inputs={"text": corpus}))
    assert once["bytes_per_token"] == thrice["bytes_per_token"]
    with pytest.raises(InputError, match="vocab_size: expected at most"):
        make_stage(vocab_size=290, min_frequency=181).run(make_context("rare", inputs={"text": corpus}))


def test_a_vocabulary_larger_than_the_text_supports_is_refused(tmp_path: Path, make_context: MakeContext) -> None:
    context = make_context(inputs={"text": make_corpus(tmp_path / "corpus", ENGLISH)})
    with pytest.raises(InputError, match=r"vocab_size: expected at most [\d,]+, got 50,000"):
        make_stage(vocab_size=50_000).run(context)
    assert not Tokenizer(context.work).model.exists()


def test_an_empty_corpus_is_refused(tmp_path: Path, make_context: MakeContext) -> None:
    context = make_context(inputs={"text": make_corpus(tmp_path / "corpus", [])})
    with pytest.raises(InputError, match=r"corpus 'text': expected documents in a sample of .*, got none"):
        make_stage().run(context)


def test_a_run_stops_on_request(tmp_path: Path, make_context: MakeContext) -> None:
    context = make_context(inputs={"text": make_corpus(tmp_path / "corpus", ENGLISH)})
    with pytest.raises(Interrupted):
        make_stage().run(dataclasses.replace(context, should_stop=lambda: True))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"special_tokens": ["<|end|>"]}, "not built in, got '<|end|>'"),
        ({"special_tokens": [" "]}, "not empty"),
        ({"special_tokens": ["a", "a"]}, "each token once"),
        ({"special_tokens": [f"<{number}>" for number in range(45)]}, "at most 50 in all, got 51"),
        ({"vocab_size": 261}, "at least 262, for 256 bytes and 6 special tokens, got 261"),
        ({"pre_tokenizer": "bert"}, "Input should be 'gpt-2'"),
    ],
)
def test_wrong_fields_are_reported(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError) as raised:
        make_stage(**changes)
    assert fault in str(raised.value)
