"""The tokenizer: round trips, special tokens, chats, and parity with Transformers."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from chat_templates import CHATML, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llm.errors import InputError
from llm.tokenizer.chat_template import CHAT_TEMPLATE, SPECIAL_TOKENS
from llm.tokenizer.pretokenizers import PreTokenizerName
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

TEXTS = [
    "The patient's fever began 3 days ago; it's 39.5 degrees, and they're worried.",
    "患者三天前开始发烧，体温39.5度，家属很担心。“怎么办？”医生说：“别急！”",
    "Fever and headache are common symptoms. Fever and headache are common.",
    "发烧和头痛是常见症状。发烧和头痛是常见症状。\n\n\t第二段　全角空格",
]
HARD = [
    "，：？！（）【】《》；“”‘’…—～",  # full-width punctuation, which NFKC would turn into ASCII
    "ＡＢＣ１２３ｶﾅ ﬁ ①½",
    "🙂👩‍⚕️🇨🇳👍🏽",
    "e\u0301 é \u00a0\u200b\ufeff\r\n\r\n   \t end ",
    "𠀀𪚥 ﷽ नमस्ते שלום مرحبا",
    "the characters <|end|> and <|begin|><|user|> in a text",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 头痛怎么办？\n"},
    {"role": "assistant", "content": "\n休息，多喝水。 "},
    {"role": "user", "content": "And fever?"},
    {"role": "assistant", "content": "Rest 🙂."},
]


def trained(name: PreTokenizerName = "qwen2", **changes: Any) -> TextTokenizer:
    options: dict[str, Any] = {"min_frequency": 2, "pre_tokenizer_name": name} | changes
    return train_bpe(TEXTS * 3, 320, **options)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return trained()


@pytest.fixture(scope="module")
def folder(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", get_args(PreTokenizerName))
def test_every_pre_tokenizer_decodes_to_the_same_text(name: PreTokenizerName) -> None:
    tokenizer = trained(name)
    for text in TEXTS + HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_document(text)) == text
        assert tokenizer.spelled_bytes(tokenizer.encode(text)) == len(text.encode())


@given(st.text())
def test_any_text_decodes_to_itself(text: str) -> None:
    tokenizer = shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in ids)


def shared(made: list[TextTokenizer] = []) -> TextTokenizer:  # noqa: B006 - hypothesis wants no fixture that lasts
    if not made:
        made.append(trained())
    return made[0]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", "ml", "，", "多喝水", "。", "\n"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", "ml", "，", "多喝水", "。", "\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", "ml", "，多喝水", "。\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", "ml", "，多喝水", "。\n"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", "ml", "，", "多喝水", "。\n"]),
    ],
)
def test_text_is_split_as_in_llama_cpp(name: PreTokenizerName, pieces: list[str]) -> None:
    # Expected pieces follow by hand from the expressions in llama.cpp's llm_tokenizer_bpe.
    from llm.tokenizer.pretokenizers import pre_tokenizer

    text = "It's 12345ml，多喝水。\n"
    offsets = [span for _, span in pre_tokenizer(name).pre_tokenize_str(text)]
    assert [text[first:last] for first, last in offsets] == pieces


def test_special_tokens_have_the_first_ids_and_are_different() -> None:
    tokenizer = trained(special_tokens=["<|tool|>"])
    assert tokenizer.special_tokens == [*SPECIAL_TOKENS, "<|tool|>"]
    assert [tokenizer.token_id(token) for token in tokenizer.special_tokens] == list(range(7))
    assert (tokenizer.begin, tokenizer.end, tokenizer.padding) == (0, 1, 2)


def test_a_document_is_between_begin_and_end_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_document(TEXTS[0])
    assert (ids[0], ids[-1]) == (tokenizer.begin, tokenizer.end)
    assert ids[1:-1] == tokenizer.encode(TEXTS[0])
    assert tokenizer.encode_documents(TEXTS) == [tokenizer.encode_document(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("named", "template", "frame"),
    [
        # As in SmolLM2, whose begin token begins every turn; Qwen, which has none; Llama 3; and a model of documents.
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, CHATML, ["<|endoftext|>", "<|endoftext|>"]),
        ({"eos_token": "<|im_end|>"}, CHATML, ["<|endoftext|>", "<|endoftext|>"]),
        ({"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}, "{{ bos_token }}" + CHATML, ["<|begin|>", "<|endoftext|>"]),
        ({"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}, "<|begin|>" + CHATML, ["<|begin|>", "<|endoftext|>"]),
        ({"bos_token": "<|begin|>", "eos_token": "<|end|>"}, None, ["<|begin|>", "<|end|>"]),
        ({"bos_token": "<|begin|>", "eos_token": "<|end|>"}, CHAT_TEMPLATE, ["<|begin|>", "<|end|>"]),
    ],
)
def test_plain_text_is_not_framed_by_the_tokens_of_a_chat(
    named: dict[str, str], template: str | None, frame: list[str]
) -> None:
    whole = tokenizer_with(CHATML)
    tokenizer = TextTokenizer(Tokenizer.from_str(whole.to_json()), named, template)
    ids = tokenizer.encode_document("a chat")
    assert [tokenizer.decode([ids[place]], special=True) for place in (0, -1)] == frame
    assert tokenizer.encode_documents(["a chat"]) == [ids]


def test_all_tokens_that_end_an_answer_are_in_the_tokenizers_own_files(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = tokenizer_with(CHATML, end="<|endoftext|>")
    whole.with_template(CHATML, ends=[whole.token_id("<|im_end|>")]).save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert [again.decode([end], special=True) for end in again.ends] == ["<|endoftext|>", "<|im_end|>"]
    stock: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert (stock.eos_token, stock.eot_token) == ("<|endoftext|>", "<|im_end|>")
    assert stock("a <|im_end|>")["input_ids"][-1] == whole.token_id("<|im_end|>")


def test_a_special_token_in_a_document_is_plain_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_document("one <|end|> two <|user|>")
    assert ids.count(tokenizer.end) == 1
    assert tokenizer.token_id("<|user|>") not in ids
    assert tokenizer.decode(ids) == "one <|end|> two <|user|>"


def test_equal_text_gives_an_equal_tokenizer(folder: Path, tmp_path: Path) -> None:
    trained().save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_loaded_tokenizer_is_the_one_that_was_saved(tokenizer: TextTokenizer, folder: Path) -> None:
    loaded = TextTokenizer.load(folder)
    assert [loaded.encode_document(text) for text in HARD] == [tokenizer.encode_document(text) for text in HARD]
    assert loaded.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    assert loaded.vocab_size == tokenizer.vocab_size == 320


def test_a_vocabulary_larger_than_the_text_supports_is_refused() -> None:
    with pytest.raises(InputError, match=r"vocab_size: expected at most \d{3}, got 5,000"):
        train_bpe(TEXTS, 5000, min_frequency=2, pre_tokenizer_name="qwen2")


def test_the_loss_mask_has_the_answers_and_their_ends(tokenizer: TextTokenizer) -> None:
    ids, loss_mask = tokenizer.encode_chat(CHAT)
    assert tokenizer.decode(ids, special=True) == (
        "<|begin|><|system|>Be brief.<|user|> 头痛怎么办？\n<|assistant|>\n休息，多喝水。 <|end|>"
        "<|user|>And fever?<|assistant|>Rest 🙂.<|end|>"
    )
    chosen = [token for token, counts in zip(ids, loss_mask, strict=True) if counts]
    assert tokenizer.decode(chosen, special=True) == "\n休息，多喝水。 <|end|>Rest 🙂.<|end|>"


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: TextTokenizer) -> None:
    ids, _ = tokenizer.encode_chat(CHAT)
    prompt = tokenizer.encode_prompt(CHAT[:-1])
    assert ids[: len(prompt)] == prompt
    assert prompt[-1] == tokenizer.token_id("<|assistant|>")


def test_many_chats_are_encoded_as_one_by_one(tokenizer: TextTokenizer) -> None:
    chats = [CHAT, CHAT[1:3], CHAT[:3]]
    assert tokenizer.encode_parts(chats) == [tokenizer.encode_parts([chat])[0] for chat in chats]


@pytest.mark.parametrize("special", ["<|end|>", "<|assistant|>"])
def test_a_special_token_in_a_chat_is_plain_text(tokenizer: TextTokenizer, special: str) -> None:
    chat = [{"role": "user", "content": f"a {special} b"}, {"role": "assistant", "content": f"c {special}"}]
    ids, loss_mask = tokenizer.encode_chat(chat)
    assert [token for token in ids if token < len(SPECIAL_TOKENS)] == [0, 4, 5, 1]  # begin, user, assistant, end
    learned = [token for token, counts in zip(ids, loss_mask, strict=True) if counts]
    assert tokenizer.decode(learned) == f"c {special}"


def test_transformers_encodes_text_to_the_same_tokens(tokenizer: TextTokenizer, stock: Any) -> None:
    for text in [text for text in TEXTS + HARD if "<|" not in text]:
        ids = stock(text)["input_ids"]
        assert ids == tokenizer.encode_document(text)[:-1]
        assert stock.decode(ids, skip_special_tokens=True) == text


def test_transformers_encodes_chats_to_the_same_tokens_and_mask(tokenizer: TextTokenizer, stock: Any) -> None:
    for chat in (CHAT, CHAT[1:3]):
        found = stock.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, loss_mask = tokenizer.encode_chat(chat)
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == [int(counts) for counts in loss_mask]
    assert stock.apply_chat_template(CHAT, tokenize=False) == tokenizer.render(CHAT)
    prompt = stock.apply_chat_template(CHAT[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt == tokenizer.encode_prompt(CHAT[:-1])


def test_transformers_knows_the_special_tokens(stock: Any) -> None:
    assert (stock.bos_token, stock.eos_token, stock.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    assert stock.all_special_tokens == list(SPECIAL_TOKENS)


def test_a_tokenizer_next_to_a_llama_config_opens_the_same(folder: Path, tmp_path: Path, stock: Any) -> None:
    from transformers import AutoTokenizer

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert [beside(text)["input_ids"] for text in TEXTS] == [stock(text)["input_ids"] for text in TEXTS]


def test_a_tokenizer_that_transformers_saved_opens_the_same(stock: Any, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stock.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(CHAT)["input_ids"] == tokenizer.encode_chat(CHAT)[0]
