"""Parity checks: equal systems pass, and every planted fault is found."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_release import PROMPTS, TEXTS, open_in_llama_cpp, tiny_checkpoint
from torch import Tensor

from llm.errors import InputError
from llm.export import gguf, gguf_tokenizer
from llm.export.gguf import write_gguf
from llm.export.parity import (
    PROBES,
    Reference,
    balanced_by_language,
    check_answers,
    check_chats,
    check_likelihoods,
    check_tokens,
    sentences,
)
from llm.export.transformers_backend import TransformersBackend
from llm.models.checkpoint import load_checkpoint
from llm.models.decoder import gguf as decoder_gguf
from llm.tokenizer.tokenizer import TextTokenizer

CHATS = [[*chat, {"role": "assistant", "content": "多喝水。 It pumps."}] for chat in PROMPTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("release"), pre_tokenizer="llama-bpe")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    tokenizer = TextTokenizer.load(checkpoint)
    prompts = [tokenizer.encode_prompt(chat) for chat in PROMPTS]
    return Reference.of(load_checkpoint(checkpoint), tokenizer, prompts, max_new_tokens=24)


def test_only_the_logits_that_are_compared_are_computed(reference: Reference) -> None:
    tokens, seen = list(reference.prompts[0]), list[int]()
    hook = reference.model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(len(logits)))
    try:
        found = reference.logits(tokens, last=2)
    finally:
        hook.remove()
    assert seen == [2]
    with torch.inference_mode():
        torch.testing.assert_close(found, reference.model(torch.tensor([tokens]))[0, -2:])


def faults(reference: Reference, written: Path, checkpoint: Path, *, precision: str = "f32") -> list[str]:
    """The comparisons that fail for a GGUF file."""
    try:
        other = open_in_llama_cpp(written, checkpoint)
    except InputError as error:
        return [str(error)]
    checks = [
        check_tokens(reference.tokenizer, other, [*TEXTS, *PROBES]),
        check_chats(reference.tokenizer, other, CHATS),
        check_likelihoods(reference, other, reference.prompts, precision=precision),
        check_answers(reference, other),
    ]
    return [check.name.removeprefix("llama.cpp: ") for check in checks if not check.passed]


def test_a_sound_file_passes_everything(reference: Reference, checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    assert faults(reference, tmp_path / "model.gguf", checkpoint) == []


def test_stock_transformers_passes_everything(reference: Reference, checkpoint: Path) -> None:
    stock = TransformersBackend(checkpoint, ends=reference.tokenizer.ends, padding=reference.tokenizer.padding)
    for check in (
        check_tokens(reference.tokenizer, stock, [*TEXTS, *PROBES]),
        check_chats(reference.tokenizer, stock, CHATS),
        check_likelihoods(reference, stock, reference.prompts),
        check_answers(reference, stock),
    ):
        assert check.passed, check
    assert check.told == "3 of 3 greedy answers"


@pytest.mark.parametrize("precision", ["f32", "q8_0"])
def test_rotary_channels_in_the_order_of_transformers_are_found(
    precision: gguf.GgufPrecision, reference: Reference, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_gguf, "interleaved", lambda weight, heads: weight)
    write_gguf(checkpoint, tmp_path / "model.gguf", precision=precision)
    assert {"likelihoods", "answers"} <= set(faults(reference, tmp_path / "model.gguf", checkpoint, precision=precision))


def test_another_pre_tokenizer_is_found(
    reference: Reference, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = gguf_tokenizer.for_llama_cpp
    digits = lambda stored: replace(true(stored), pre_tokenizer="qwen2")  # noqa: E731  # which cuts numbers into digits
    monkeypatch.setattr(gguf_tokenizer, "for_llama_cpp", digits)
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    assert "tokens" in faults(reference, tmp_path / "model.gguf", checkpoint)


def test_texts_that_differ_as_is_known_pass_while_they_are_few_and_are_told(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    path = checkpoint / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    tokenizer, other = TextTokenizer.load(checkpoint), open_in_llama_cpp(tmp_path / "model.gguf", checkpoint)
    known = gguf_tokenizer.KnownTokens(checkpoint)
    plain = [f"The heart pumps {number} times." for number in range(99)]
    few = check_tokens(tokenizer, other, [*PROBES, *plain, "cafe\u0301"], known=known)
    assert few.passed
    assert few.told == (
        "110 of 112 texts; 2 others as it is known to give them (it does not bring text into Unicode's NFC), "
        f"such as {PROBES[10]!r}, 'cafe\u0301'"
    )
    assert not check_tokens(tokenizer, other, [*PROBES, *plain, "cafe\u0301", "nai\u0308ve"], known=known).passed
    assert not check_tokens(tokenizer, other, ["cafe\u0301"]).passed  # of a system that is to give the same


def without_last_token(stored: dict[str, object]) -> None:
    model = stored["model"]
    assert isinstance(model, dict)
    last = max(model["vocab"], key=lambda token: model["vocab"][token])
    del model["vocab"][last]
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != last]


def roles_as_text(stored: dict[str, object]) -> None:
    tokens = stored["added_tokens"]
    assert isinstance(tokens, list)
    for token in tokens:
        token["special"] = token["special"] and token["content"] != "<|user|>"
        token["content"] = token["content"].replace("<|user|>", "<|someone|>")


@pytest.mark.parametrize(("spoil", "found"), [(without_last_token, "tokens"), (roles_as_text, "chats")])
def test_a_token_that_is_missing_is_found(
    spoil: Callable[[dict[str, object]], None], found: str, reference: Reference, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "spoilt")
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    spoil(stored)
    (tmp_path / "spoilt" / "tokenizer.json").write_text(json.dumps(stored))
    write_gguf(tmp_path / "spoilt", tmp_path / "model.gguf", precision="f32")
    assert found in faults(reference, tmp_path / "model.gguf", checkpoint)


def test_another_chat_template_is_found_in_both(reference: Reference, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "spoilt")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("'<|user|>' +", "'<|user|> ' +")
    (tmp_path / "spoilt" / "tokenizer_config.json").write_text(json.dumps(config))
    write_gguf(tmp_path / "spoilt", tmp_path / "model.gguf", precision="f32")
    assert faults(reference, tmp_path / "model.gguf", checkpoint) == ["chats"]
    stock = TransformersBackend(tmp_path / "spoilt", ends=reference.tokenizer.ends, padding=reference.tokenizer.padding)
    check = check_chats(reference.tokenizer, stock, CHATS)
    assert not check.passed
    assert "0 of 6 renderings; the first: 'What does the heart do?' is [" in check.told


def test_a_file_that_llama_cpp_does_not_open_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"model\.gguf: expected a file that llama\.cpp opens"):
        open_in_llama_cpp(tmp_path / "model.gguf", checkpoint)


class FixedAnswers:
    """A system that gives the answers it was made with."""

    name = "fixed"

    def __init__(self, answers: list[list[int]]) -> None:
        self._answers = answers

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_prompt(self, messages: object) -> list[int]:
        raise NotImplementedError

    def encode_chat(self, messages: object) -> None:
        raise NotImplementedError

    def log_probabilities(self, tokens: Sequence[int]) -> Tensor:
        return torch.full((1, 340), torch.nan)

    def answers(self, prompts: object, *, max_new_tokens: int) -> list[list[int]]:
        return self._answers


def test_answers_that_diverge_at_a_near_tie_pass_and_others_fail(reference: Reference, checkpoint: Path) -> None:
    """A model in which two tokens have equal weights cannot prefer one."""
    model = load_checkpoint(checkpoint)
    prompt, answer = list(reference.prompts[0]), list(reference.answers[0])
    twin = next(token for token in range(20, 60) if token not in answer)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[answer[3]]  # it is the embedding too
    tied = Reference(model, reference.tokenizer, [prompt], [answer], max_new_tokens=24)
    near = check_answers(tied, FixedAnswers([[*answer[:3], twin]]))
    assert near.passed
    assert near.told == "0 of 1 greedy answers, 1 diverge where two logits are less than 0.0001 apart"
    assert near.measured == {"near_ties": 1}
    other = next(token for token in range(60, 90) if token not in answer)
    for wrong in ([*answer[:3], other], answer[:3]):  # another token, or an end
        assert not check_answers(tied, FixedAnswers([wrong])).passed


def test_a_system_that_reports_no_numbers_is_not_equal(reference: Reference) -> None:
    assert not check_likelihoods(reference, FixedAnswers([]), reference.prompts).passed


def test_sentences_are_of_both_languages_in_equal_numbers() -> None:
    found = list(sentences(["One. Two? Three 3.5 times!\nFour", "一。二！“三？”四"]))
    assert found == ["One.", "Two?", "Three 3.5 times!", "Four", "一。", "二！", "“三？", "”四"]
    many = balanced_by_language([f"Sentence {number}." for number in range(100)] + ["一。", "二。", "二。"], 10)
    assert {language: len(texts) for language, texts in many.items()} == {"zh": 2, "en": 8}
    assert many["en"][0] == "Sentence 0." and many["en"][-1] == "Sentence 87."
