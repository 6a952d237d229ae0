"""Model folders: opened by stock Transformers, and what Transformers writes opened here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm.checkpoint import load_checkpoint, save_checkpoint
from llm.errors import InputError
from llm.files import write_tensors
from llm.models import architectures
from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama
from llm.tokenizer import TextTokenizer, train_bpe

TOKENS = torch.tensor([[0, 5, 9, 33, 7, 120, 44]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = ["the heart pumps blood", "the lungs breathe air"]
    train_bpe(text, 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(folder)
    return folder


def fresh(tokenizer: Path, **changes: object) -> Llama:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64, "rope_base": 5000.0}
    return Llama(LlamaConfig.model_validate(sizes | changes), vocab_size=TextTokenizer.load(tokenizer).vocab_size)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_it_and_computes_the_same(tokenizer: Path, tmp_path: Path, tied: bool) -> None:
    model = fresh(tokenizer, tied=tied)
    save_checkpoint(tmp_path, model, tokenizer)
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_opened_and_saved_by_transformers_it_opens_here_as_it_was(tokenizer: Path, tmp_path: Path, tied: bool) -> None:
    model = fresh(tokenizer, tied=tied)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        opened = load_checkpoint(tmp_path / folder)
        assert opened.config == model.config and opened.vocab_size == model.vocab_size
        for (name, weight), (_, wanted) in zip(opened.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(weight, wanted), name


def test_the_tokenizer_and_its_special_tokens_come_along(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    ours, theirs = TextTokenizer.load(tokenizer), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the heart", add_special_tokens=False).input_ids == ours.encode("the heart")
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (ours.begin, ours.end, ours.padding)


def test_a_tied_head_is_stored_once_and_stays_tied(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    opened = load_checkpoint(tmp_path)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


def test_saving_again_gives_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "first", fresh(tokenizer), tokenizer)
    save_checkpoint(tmp_path / "second", load_checkpoint(tmp_path / "first"), tmp_path / "first")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_it_opens_in_another_precision(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    assert {weight.dtype for weight in load_checkpoint(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "qwen3"), ("attention_bias", True), ("hidden_act", "gelu"), ("rope_parameters", {"rope_type": "yarn"})],
)
def test_a_config_that_the_model_cannot_honour_is_refused_by_its_field(
    tokenizer: Path, tmp_path: Path, field: str, value: object
) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(InputError, match=r"config.json: rope_type" if field == "rope_parameters" else f"config.json: {field}"):
        load_checkpoint(tmp_path)


def test_the_architecture_is_found_by_what_transformers_calls_it(tokenizer: Path, tmp_path: Path) -> None:
    model = fresh(tokenizer)
    for architecture in architectures().values():
        fields = architecture.to_transformers(model.config)
        assert fields["model_type"] == architecture.model_type
        assert architecture.from_transformers(fields, dropout=0.0) == model.config
    save_checkpoint(tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(InputError, match=r"config.json: model_type wants 'llama', found 'qwen3'"):
        load_checkpoint(tmp_path)


def test_weights_of_another_shape_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match="the weights are not those of its config"):
        load_checkpoint(tmp_path)


def test_who_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
