"""Imported models compute, tokenize and chat as in stock Transformers, or are refused."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm.data.batch import IGNORE
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import Template
from llm.data.packing import PackedRows
from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
TEXTS = ["The heart, 发烧 🙂 12345.\n\n two", " lead", "trail \n", "<0x41>", ""]
CHAT = [
    {"role": "user", "content": "What does the heart do?"},
    {"role": "assistant", "content": "It pumps  blood, 患者."},
    {"role": "user", "content": "And the lungs?"},
    {"role": "assistant", "content": "They breathe."},
]
# What is learned of CHAT, by hand from each template: text and end token, nothing of what the template writes around it.
LEARNED = {
    "llama-2": ["It pumps  blood, 患者. </s>", "They breathe. </s>"],
    "llama-3": ["It pumps  blood, 患者.<|eot_id|>", "They breathe.<|eot_id|>"],
    "smollm": ["It pumps  blood, 患者.<|im_end|>", "They breathe.<|im_end|>"],
    "tinyllama": ["It pumps  blood, 患者.</s>", "They breathe.</s>"],
}


DOCUMENTS = {  # what begins and ends plain text
    "llama-2": ["<s>", "</s>"],
    "llama-3": ["<|begin_of_text|>", "<|end_of_text|>"],
    "smollm": ["<|endoftext|>", "<|endoftext|>"],
    "tinyllama": ["<s>", "</s>"],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, as its publisher saved it."""
    folder = tmp_path_factory.mktemp("published")
    for name, build in FAMILIES.items():
        build(folder / name)
    return folder.__truediv__


@pytest.fixture(scope="module")
def adopted(published: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, as it was taken over."""
    folder = tmp_path_factory.mktemp("adopted")
    for name in FAMILIES:
        (folder / name).mkdir()
        import_checkpoint(inspect_checkpoint(published(name)), folder / name)
    return folder.__truediv__


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model folder with other fields in its tokenizer_config.json; None takes a field away."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "tokenizer_config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    (target / "chat_template.jinja").unlink()
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_the_published_model_computes(
    published: Callable[[str], Path], adopted: Callable[[str], Path], name: str
) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(published(name), dtype=torch.float32)
    found, report = AutoModelForCausalLM.from_pretrained(adopted(name), dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, wanted.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = wanted(tokens).logits
        assert torch.equal(found(tokens).logits, logits)
        torch.testing.assert_close(load_checkpoint(adopted(name))(tokens), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_keep_their_precision_and_become_one_file(
    published: Callable[[str], Path], adopted: Callable[[str], Path], name: str
) -> None:
    assert sorted(path.name for path in adopted(name).iterdir()) == FILES
    wanted: dict[str, torch.Tensor] = {}
    for path in published(name).glob("*.safetensors"):
        wanted |= load_file(path)
    found = load_file(adopted(name) / "model.safetensors")
    assert found.keys() == wanted.keys()
    for weight in wanted:
        assert found[weight].dtype == wanted[weight].dtype and torch.equal(found[weight], wanted[weight]), weight


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_tokenizes_alike_before_and_after(
    published: Callable[[str], Path], adopted: Callable[[str], Path], name: str
) -> None:
    ours = TextTokenizer.load(adopted(name))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (published(name), adopted(name)))
    for text in TEXTS:
        assert before(text).input_ids == after(text).input_ids
        assert after(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after, special) == getattr(before, special)
    document = ours.encode_document("The heart")
    assert [ours.decode([document[place]], special=True) for place in (0, -1)] == DOCUMENTS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_chats_are_the_rendered_stream_and_the_answers_are_learned(adopted: Callable[[str], Path], name: str) -> None:
    ours, stock = TextTokenizer.load(adopted(name)), AutoTokenizer.from_pretrained(adopted(name))
    ids, learned = ours.encode_chat(CHAT)
    whole = stock.apply_chat_template(CHAT)["input_ids"]
    assert whole[: len(ids)] == ids
    assert stock.decode(whole[len(ids) :]).strip() == ""  # a line break after the last end, say
    pairs = zip(ids, learned, strict=True)
    runs = [[token for token, _ in run] for is_learned, run in groupby(pairs, key=lambda pair: pair[1]) if is_learned]
    assert [ours.decode(run, special=True) for run in runs] == LEARNED[name]
    assert {run[-1] for run in runs} <= set(ours.ends)
    for turns, run in ((1, ids[: learned.index(True)]), (3, ids[: len(ids) - len(runs[-1])])):
        assert ours.encode_prompt(CHAT[:turns]) == run
        assert stock.apply_chat_template(CHAT[:turns], add_generation_prompt=True)["input_ids"] == run


def test_rows_are_packed_with_the_models_own_template(adopted: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"chat": CHAT}))
    tokenizer = TextTokenizer.load(adopted("tinyllama"))
    write_rows(
        tmp_path / "rows",
        [Table((tmp_path / "rows.jsonl",), Template(messages="chat"))],
        tokenizer=tokenizer,
        context=100,
        report=lambda **values: None,
        should_stop=lambda: False,
    )
    row = PackedRows(tmp_path / "rows", seed=None).row(0)
    ids, learned = tokenizer.encode_chat(CHAT)
    assert row.tokens[: len(ids) - 1].tolist() == ids[:-1]
    assert row.targets[row.targets != IGNORE].tolist() == [i for i, is_learned in zip(ids, learned, strict=True) if is_learned]


def test_all_tokens_that_end_an_answer_are_kept(adopted: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(adopted("llama-3"))
    assert [tokenizer.decode([end], special=True) for end in tokenizer.ends] == ["<|eot_id|>", "<|end_of_text|>"]
    assert GenerationConfig.from_pretrained(adopted("llama-3")).eos_token_id == list(tokenizer.ends)


def test_a_template_that_asks_for_the_date_gets_one_fixed_day(adopted: Callable[[str], Path]) -> None:
    stock = AutoTokenizer.from_pretrained(adopted("llama-3"))
    assert "Today Date: 26 Jul 2024<|eot_id|>" in stock.apply_chat_template(CHAT, tokenize=False)


def test_the_token_that_ends_an_answer_in_the_template_ends_generation_too(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    # A base model whose end token is for documents, with a template whose turns end with another.
    folder = copied(published("smollm"), tmp_path / "base", eos_token="<|endoftext|>")
    (folder / "chat_template.jinja").write_text((published("smollm") / "chat_template.jinja").read_text())
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": 330}))
    tokenizer = inspect_checkpoint(folder).tokenizer
    assert [tokenizer.decode([end], special=True) for end in tokenizer.ends] == ["<|endoftext|>", "<|im_end|>"]


def test_a_model_without_a_template_gets_the_plain_one(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("llama-2"), tmp_path / "base")
    tokenizer = inspect_checkpoint(folder).tokenizer
    assert tokenizer.render(CHAT) == (
        "<s>User: What does the heart do?\n\nAssistant: It pumps  blood, 患者.</s>"
        "User: And the lungs?\n\nAssistant: They breathe.</s>"
    )
    ids, learned = tokenizer.encode_chat(CHAT[:2])
    assert ids[: learned.index(True)] == tokenizer.encode_prompt(CHAT[:1])
    assert tokenizer.decode(ids[learned.index(True) :], special=True) == "It pumps  blood, 患者.</s>"


def test_a_template_of_the_recipe_replaces_the_models_own(published: Callable[[str], Path]) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}Q {{ message.content }} A"
        "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer = inspect_checkpoint(published("llama-2"), chat_template=template).tokenizer
    assert tokenizer.render(CHAT[:2]) == "Q What does the heart do? A It pumps  blood, 患者.</s>"
    ids, learned = tokenizer.encode_chat(CHAT[:2])
    assert tokenizer.decode(ids[learned.index(True) :], special=True) == "It pumps  blood, 患者.</s>"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ messages", "the chat template refuses this chat: "),
        ("{{ raise_exception('no') }}", "the chat template refuses this chat: no"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no end token follows the assistant's text"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "the assistant's text is not rendered unchanged"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "an earlier part of a chat changes with what follows",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}",
            "expected each part that it marks as learned to end with the same special token, by which the "
            "model learns to stop, got",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(published: Callable[[str], Path], template: str, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        inspect_checkpoint(published("tinyllama"), chat_template=template)


def test_a_chat_that_the_template_refuses_is_an_input_error(adopted: Callable[[str], Path]) -> None:
    tokenizer = TextTokenizer.load(adopted("llama-2"))
    with pytest.raises(InputError, match="refuses this chat: Only user and assistant roles are supported!"):
        tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, *CHAT])


def test_a_vocabulary_without_begin_and_padding_uses_its_end_token(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("smollm"), tmp_path / "base", bos_token=None, pad_token=None)
    tokenizer = inspect_checkpoint(folder).tokenizer
    assert tokenizer.encode_document("x") == [tokenizer.end, *tokenizer.encode("x"), tokenizer.end]
    assert tokenizer.special_ids == {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": None}


def test_special_tokens_are_found_where_older_versions_put_them(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(
        published("llama-2"),
        tmp_path / "old",
        bos_token=None,
        eos_token={"__type": "AddedToken", "content": "</s>", "special": True},
        chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}y"}],
        tokenizer_class="LlamaTokenizer",
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<unk>"}))
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.begin, tokenizer.end, tokenizer.template) == (1, 2, "{{ bos_token }}y")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"eos_token": None}, r"eos_token: expected a token of .*tokenizer\.json, got None"),
        ({"eos_token": "<|nothing|>"}, r"eos_token: expected a token of .*tokenizer\.json, got '<\|nothing\|>'"),
    ],
)
def test_a_tokenizer_without_an_end_token_is_refused(
    published: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        inspect_checkpoint(copied(published("llama-2"), tmp_path / "base", **changes))


def test_a_tokenizer_in_another_form_is_refused(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("llama-2"), tmp_path / "base")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer of the tokenizers library, got no file"):
        inspect_checkpoint(folder)


def test_special_tokens_without_a_row_of_the_embedding_are_left_out(published: Callable[[str], Path], tmp_path: Path) -> None:
    """As Gemma 3's token of pictures, which its text models have no row for."""
    folder = copied(published("tinyllama"), tmp_path / "base")
    (folder / "chat_template.jinja").write_text((published("tinyllama") / "chat_template.jinja").read_text())
    stored = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    picture = stored["added_tokens"][0] | {"id": rows, "content": "<picture>"}
    (folder / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": [*stored["added_tokens"], picture]}))
    candidate = inspect_checkpoint(folder)
    assert candidate.tokenizer.vocab_size == candidate.vocab_size == rows
    assert "<picture>" not in candidate.tokenizer.special_tokens
    plain = inspect_checkpoint(published("tinyllama")).tokenizer
    assert candidate.tokenizer.encode_chat(CHAT) == plain.encode_chat(CHAT)
    assert candidate.tokenizer.encode_document("a <picture>") == plain.encode_document("a <picture>")


def test_a_vocabulary_larger_than_the_embedding_is_refused(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("llama-2"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(
        InputError, match=r"config\.json: vocab_size: expected room for all 409 tokens of tokenizer\.json, got 400"
    ):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda w: w | {"model.layers.0.mlp.up_proj.bias": torch.zeros(48)},
            "up_proj.bias: expected no such weight, got shape (48,)",
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"},
            "model.norm.weight: expected shape (32,), got no such",
        ),
        (
            lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()},
            "expected weights of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, got F8_E4M3",
        ),
    ],
)
def test_weights_that_are_not_a_llamas_are_refused_by_their_name(
    published: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], complaint: str
) -> None:
    folder = copied(published("llama-2"), tmp_path / "base")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(InputError, match=re.escape(complaint)):
        import_checkpoint(inspect_checkpoint(folder), tmp_path)


def test_a_tied_head_that_is_stored_must_be_the_embedding(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("smollm"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    import_checkpoint(inspect_checkpoint(folder), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json: tie_word_embeddings: expected false, got true"):
        import_checkpoint(inspect_checkpoint(folder), tmp_path)


def test_buffers_of_old_versions_are_left_out(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(published("llama-2"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | old, folder / "model.safetensors")
    import_checkpoint(inspect_checkpoint(folder), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
