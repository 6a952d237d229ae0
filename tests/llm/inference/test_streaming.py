"""Streams of text: pieces join to the whole, never end inside a character, and hold back no complete character."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from llm.errors import InputError
from llm.inference.generate import generate
from llm.inference.sampling import Sampling
from llm.inference.streaming import pieces, stream, until_stop
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

TEXT = "发烧 39.5° — é, 患者说：“好👩‍⚕️🇨🇳!” Fever.\n\n 𠀀 \t end "
TRAINED_ON = ["患者三天前开始发烧，体温39.5度。", "The patient's fever began 3 days ago."]
Decode = Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def byte_level() -> TextTokenizer:
    return train_bpe(TRAINED_ON * 3, 300, min_frequency=2, pre_tokenizer_name="qwen2")


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: unknown characters are tokens of one byte each, a space is "▁", and the first is not spelled."""
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "F", "e", "v", "r", "e", "▁F", "发"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "F")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def joined(tokens: Sequence[int], decode: Decode) -> str:
    return "".join(pieces(iter(tokens), decode=decode))


def given_after_each(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The text given by the time the next token is asked for."""
    seen: list[str] = []
    given = ""

    def asked() -> object:
        for token in tokens:
            yield token
            seen.append(given)

    for piece in pieces(asked(), decode=decode):  # type: ignore[arg-type]
        given += piece
    return seen


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20) | st.just(TEXT))
def test_pieces_are_whole_characters_as_soon_as_they_are_complete(byte_level: TextTokenizer, text: str) -> None:
    tokens = byte_level.encode(text)
    assert joined(tokens, byte_level.decode) == text
    spelled = text.encode()
    for count, so_far in enumerate(given_after_each(tokens, byte_level.decode), 1):
        whole = spelled[: byte_level.spelled_bytes(tokens[:count])].decode(errors="ignore")  # without a torn last character
        # A character that is U+FFFD itself looks torn until more follows.
        assert so_far.rstrip("\ufffd") == whole.rstrip("\ufffd")


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_join_to_the_decoded_text_even_of_invalid_bytes(byte_level: TextTokenizer, tokens: list[int]) -> None:
    assert joined(tokens, byte_level.decode) == byte_level.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20).filter(lambda text: "▁" not in text) | st.just(TEXT))
def test_byte_fallback_gives_whole_characters_too(byte_fallback: Tokenizer, text: str) -> None:
    tokens = byte_fallback.encode(text).ids
    assert byte_fallback.decode(tokens) == text
    assert joined(tokens, byte_fallback.decode) == text
    for so_far in given_after_each(tokens, byte_fallback.decode):
        assert text.startswith(so_far)


def test_invalid_bytes_do_not_change_characters_that_were_yielded(byte_fallback: Tokenizer) -> None:
    ids = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in ("大".encode() + b"\xff")]
    ids.append(byte_fallback.token_to_id("▁F"))
    assert joined(ids, byte_fallback.decode) == "大\ufffd F"


@pytest.fixture(scope="module")
def model(byte_level: TextTokenizer) -> Decoder:
    torch.manual_seed(7)
    config = DecoderConfig(hidden_size=32, layers=2, heads=4, context=96)
    return Decoder(config, vocab_size=byte_level.vocab_size).eval()


def test_a_stream_is_the_text_that_generate_gives(model: Decoder, byte_level: TextTokenizer) -> None:
    prompt = byte_level.encode("发烧")
    sampling = Sampling(temperature=2.0, min_p=0.05, seed=3)
    (answer,) = generate(model, [prompt], max_new_tokens=80, end=byte_level.ends, sampling=sampling)
    given = list(stream(model, prompt, tokenizer=byte_level, max_new_tokens=80, sampling=sampling))
    assert "".join(given) == byte_level.decode(answer)
    assert len(given) > 20
    end = answer[30]
    short = stream(model, prompt, tokenizer=byte_level, max_new_tokens=80, sampling=sampling, end=[end])
    assert "".join(short) == byte_level.decode(answer[: answer.index(end)])


def test_a_stream_ends_before_a_stop_text(model: Decoder, byte_level: TextTokenizer) -> None:
    prompt = byte_level.encode("发烧")
    whole = "".join(stream(model, prompt, tokenizer=byte_level, max_new_tokens=60))
    stop = whole[20:23]
    found = stream(model, prompt, tokenizer=byte_level, max_new_tokens=60, stop=[stop, "never said"])
    assert "".join(found) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("texts", "stop", "given"),
    [
        (["ab", "cd"], [], ["ab", "cd"]),
        (["a\n", "\nb"], ["\n\n"], ["a"]),
        (["a\n", "b\n"], ["\n\n"], ["a", "\nb", "\n"]),
        (["xaa", "aab"], ["aab"], ["x", "aa"]),
        (["User", ": hi"], ["User:", "hi"], []),
        (["hi User"], ["User:", "ser"], ["hi U"]),
    ],
)
def test_a_possible_stop_text_is_held_back_no_longer_than_needed(texts: list[str], stop: list[str], given: list[str]) -> None:
    assert list(until_stop(iter(texts), stop)) == given


def test_an_empty_stop_text_is_refused(model: Decoder, byte_level: TextTokenizer) -> None:
    with pytest.raises(InputError, match="stop: expected texts of at least one character, got an empty one"):
        stream(model, [1], tokenizer=byte_level, max_new_tokens=1, stop=[""])
