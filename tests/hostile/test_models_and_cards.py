"""Models, tokenizers, adapters and addresses of strangers: nothing they name is imported, and what they say is only text."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llm.adapters.lora import check_config
from llm.errors import InputError
from llm.models.checkpoint import read_config, weight_files
from llm.tokenizer.files import open_tokenizer
from llm.tokenizer.tokenizer import TextTokenizer
from runner.errors import RecipeError
from runner.hub.model_card import _listed, _place, _table
from runner.hub.model_card_usage import _code
from runner.published.recipe import Address
from runner.stages.checkpoint import ImportCheckpoint
from runner.stages.publish import Publish

NESTED = "[" * 200_000


@pytest.mark.parametrize(
    "content",
    [
        NESTED,
        '{"a":' * 100_000,
        "null",
        "[]",
        "{}",
        '{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}',
        '{"peft_type": "LORA", "auto_mapping": {"parent_library": "os", "base_model_class": "system"}}',
        '{"peft_type": "IA3"}',
        '{"peft_type": ["LORA"]}',
        "\x00",
    ],
    ids=range(10),
)
def test_the_configuration_of_an_adapter_names_no_module(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=r"adapter_config\.json: "):
        check_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        NESTED,
        '{"a":' * 100_000,
        "9" * 100_000,
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}',
        '{"model_type": "x"}',
        '{"model_type": "llama", "vocab_size": 10, "auto_map": {"AutoModelForCausalLM": "owner/evil--evil.Model"}}',
        '{"model_type": "llama", "vocab_size": 10, "quantization_config": {"quant_method": "evil"}}',
        '{"model_type": "llama", "vocab_size": "10"}',
    ],
    ids=range(8),
)
def test_the_configuration_of_a_model_is_only_numbers(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    begun = time.process_time()
    with pytest.raises(InputError, match=r"config\.json: "):
        read_config(tmp_path / "config.json")
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "content",
    [
        NESTED,
        "{}",
        "[]",
        '{"weight_map": {"a": "../../evil.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": []}',
    ],
    ids=range(8),
)
def test_the_index_of_weights_names_safetensors_beside_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unopened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(InputError, match="a pickle, which can run code"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", [NESTED, "{}", '{"model": {"type": "Evil"}}', "\x00", '{"version": "1.0"}'], ids=range(5))
def test_a_broken_tokenizer_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="expected a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_nested_files_beside_a_tokenizer_are_errors(name: str, tmp_path: Path) -> None:
    _tokenizer("a").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="expected JSON"):
        TextTokenizer.load(tmp_path)


def _tokenizer(expression: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<e>": 2}, merges=[]))
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    return tokenizer


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*.*)*$", "((a*)*)*$"])
@pytest.mark.parametrize("call", ["encode", "encode_batch", "encode_document"])
def test_an_expression_that_backtracks_is_an_error_soon(expression: str, call: str) -> None:
    tokenizer = TextTokenizer(_tokenizer(expression), {"eos_token": "<e>"}, None)
    text: Any = "a" * 40 + "b"
    begun = time.process_time()
    try:
        getattr(tokenizer, call)([text] if call == "encode_batch" else text)
    except InputError as error:
        told = str(error)
        assert "cannot split a text into words" in told  # some are fast enough to give tokens
    assert time.process_time() - begun < 10


def test_an_expression_that_backtracks_is_told_as_an_error_of_the_tokenizer() -> None:
    tokenizer = TextTokenizer(_tokenizer("(a|a)*$"), {"eos_token": "<e>"}, None)
    with pytest.raises(InputError, match="retry-limit"):
        tokenizer.encode("a" * 40 + "b")


# Addresses

PLACES = [
    "..",
    "../..",
    "../x",
    ".git/x",
    "-x/y",
    "a/..",
    "a/.x",
    "a/b/c",
    "a//b",
    "a/b?x=1",
    "a/b#x",
    "a/b\n",
    "",
    "a/b\x00",
    "a b/c",
]


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_an_address_on_the_hub_is_an_owner_and_a_name(place: str) -> None:
    with pytest.raises(RecipeError, match="expected hf://OWNER/NAME"):
        Address.parse(f"hf://{place}")
    with pytest.raises(ValidationError):
        ImportCheckpoint.model_validate({"repo": place})
    if place not in ("..",):
        with pytest.raises(ValidationError):
            Publish.model_validate({"model": "m", "repo": place})


@pytest.mark.parametrize("revision", ["..", "../main", "main/..", "a/../b", "/main", ".x", "a//b", "x?y", "refs/../x"])
def test_a_revision_does_not_climb(revision: str) -> None:
    with pytest.raises(RecipeError):
        Address.parse(f"hf://owner/name@{revision}")


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "a" * 40, "feature/x-y"])
def test_usual_revisions_are_taken(revision: str) -> None:
    assert Address.parse(f"hf://owner/na.me-1@{revision}").revision == revision


# Cards


MARKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "`code`",
    "a|b",
    "a\nb\n# head",
    "&lt;script>",
]


@pytest.mark.parametrize("text", MARKS)
def test_texts_of_rows_are_no_markup_in_a_card(text: str) -> None:
    table = _table(["licences"], [[_listed({text: 3})], [_place(f"data/{text}.jsonl")]])
    assert len(table.splitlines()) == 4
    assert "<" not in table and "](" not in table.replace("\\](", "")
    assert ("&amp;lt;" in table) == text.startswith("&")


@pytest.mark.parametrize("ticks", [0, 3, 4, 20])
def test_a_prompt_does_not_end_its_block_in_a_card(ticks: int) -> None:
    prompt = "`" * ticks + "\n# not a heading\n<script>"
    lines = _code("", [prompt]).splitlines()
    assert lines[0] == lines[-1] and len(lines[0]) > ticks and {*lines[0]} == {"`"}


def test_a_deeply_nested_row_is_a_bad_row(tmp_path: Path) -> None:
    from llm.text.readers import read_rows

    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 500_000 + "\n" + json.dumps({"text": "a"}) + "\n")
    first, second = read_rows([path], {"text"})
    with pytest.raises(InputError, match="not JSON"):
        first.fields()
    assert second.fields() == {"text": "a"}
