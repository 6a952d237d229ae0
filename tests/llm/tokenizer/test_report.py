"""The measurements of a tokenizer, on text small enough to count by hand."""

import json
from pathlib import Path

import pytest

from llm.errors import InputError
from llm.text.documents import Document
from llm.tokenizer.files import open_tokenizer
from llm.tokenizer.report import measured_documents, report, sample_sentences
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe


def tokenizer_of(texts: list[str], vocab_size: int = 300) -> TextTokenizer:
    return train_bpe(texts, vocab_size, min_frequency=2, pre_tokenizer_name="qwen2", allow_smaller=True)


def document(text: str) -> Document:
    return Document(text, 1, None, 0)


def test_lengths_are_reported_by_language_and_against_others(tmp_path: Path) -> None:
    bytes_only = tokenizer_of(["."], 262)  # no pair is ever merged: a token a byte
    merged = tokenizer_of(["头痛头痛 aa"] * 5)  # "头痛" is one token, and "aa" with the space before it
    assert [len(merged.encode(text)) for text in ("头痛", " aa")] == [1, 1]
    bytes_only.save(tmp_path)
    found = report(
        merged,
        [document("头痛"), document(" aa")],
        english_only=bytes_only,
        others={"other": open_tokenizer(tmp_path / "tokenizer.json")},
    )
    assert found["measured"] == {"documents": 2, "bytes": {"all": 9, "en": 3, "zh": 6}}
    assert found["bytes_per_token"] == {"all": 4.5, "en": 3.0, "zh": 6.0}
    ratios = {"all": 0.2222, "en": 0.3333, "zh": 0.1667}
    assert found["sequence_length"] == {
        "bytes": ratios,
        "english_only": {**ratios, "vocab_size": 262},
        "other": {**ratios, "vocab_size": 262},
    }
    assert found["unknown_rate"] == 0
    assert found["round_trip"] == {"sentences": 2, "failures": 0}


def test_unknown_bytes_are_counted(tmp_path: Path) -> None:
    tokenizer_of(["abc"]).save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del state["model"]["vocab"]["z"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    without_z = TextTokenizer.load(tmp_path)
    found = report(without_z, [document("az\naa")], english_only=None, others={})
    assert found["unknown_rate"] == pytest.approx(1 / 4)  # the z of a, z, a, a: a line's end belongs to no sentence
    assert found["round_trip"] == {"sentences": 2, "failures": 1}
    assert found["sequence_length"]["english_only"] is None


def test_sentences_are_drawn_from_both_languages_and_keep_their_punctuation() -> None:
    texts = ["One thing. Another one!\nA line", "第一句。第二句！”第三句"]
    assert set(sample_sentences([document(text) for text in texts])) == {
        "One thing. ",
        "Another one!",
        "A line",
        "第一句。",
        "第二句！”",
        "第三句",
    }
    assert len(sample_sentences([document(f"Sentence {number}.") for number in range(50)], count=20)) == 20


def test_training_documents_are_measured_only_where_held_out_ones_are_too_few(tmp_path: Path) -> None:
    validation, train = tmp_path / "validation.jsonl", tmp_path / "train.jsonl"
    for path, word in ((validation, "held"), (train, "learned")):
        path.write_text("".join(json.dumps({"text": f"{word} {number}", "passes": 1}) + "\n" for number in range(200)))
    held = measured_documents(validation, train, size=1000)
    both = measured_documents(validation, train, size=100_000)
    assert {document.text.split()[0] for document in held} == {"held"}
    assert len(both) == 400


def test_a_file_that_is_no_tokenizer_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer of the tokenizers library"):
        open_tokenizer(tmp_path / "tokenizer.json")
