"""Model folders: opened by stock Transformers, and what Transformers writes opened here."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_release import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm.errors import InputError
from llm.files import write_tensors
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

TOKENS = torch.tensor([[0, 5, 9, 33, 7, 120, 44]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = ["the heart pumps blood", "the lungs breathe air"]
    train_bpe(text, 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(folder)
    return folder


def fresh(tokenizer: Path, **changes: object) -> Decoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64, "rope_base": 5000.0}
    return Decoder(DecoderConfig.model_validate(sizes | changes), vocab_size=TextTokenizer.load(tokenizer).vocab_size)


def test_the_tokenizer_and_its_special_tokens_are_saved(tokenizer: Path, tmp_path: Path) -> None:
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


def test_opening_a_model_does_not_wait_for_the_import_of_the_compiler(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    code = (
        "import sys; from pathlib import Path; from llm.models.checkpoint import load_checkpoint\n"
        "load_checkpoint(Path(sys.argv[1])); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen3_moe"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("rope_parameters.rope_type", "proportional"),
        ("rope_scaling.type", "mrope"),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 4096),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Other"}),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("vocab_size", None),
    ],
)
def test_an_unsupported_config_is_refused_with_the_name_of_its_field(
    tokenizer: Path, tmp_path: Path, field: str, value: object
) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    table, _, key = field.partition(".")
    config = json.loads((tmp_path / "config.json").read_text()) | {table: {key: value} if key else value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = re.escape(repr(value))
    with pytest.raises(InputError, match=rf"config\.json: {re.escape(field)}: expected .*, got {found}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        ({"rope_type": "linear"}, "rope_parameters.factor: expected a number for the rope_type 'linear', got None"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_parameters.low_freq_factor: expected a number"),
        ({"rope_type": "linear", "factor": 0.5}, "factor: expected greater than or equal to 1, got 0.5"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "low_frequency_factor: expected less than high_frequency_factor, 4.0, got 4.0",
        ),
    ],
)
def test_an_incomplete_or_invalid_rope_scaling_is_refused(
    tokenizer: Path, tmp_path: Path, scaling: dict[str, Any], complaint: str
) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    with pytest.raises(InputError, match=re.escape(complaint)):
        load_checkpoint(tmp_path)


SCALINGS: list[dict[str, Any]] = [
    {"kind": "linear", "factor": 4.0},
    {"kind": "llama3", "factor": 8.0, "original_context": 32},
    {
        "kind": "llama3",
        "factor": 32.0,
        "low_frequency_factor": 0.5,
        "high_frequency_factor": 16.0,
        "original_context": 256,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaled_rotary_embedding_equals_that_of_transformers_far_beyond_the_original_context(
    tokenizer: Path, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    model = fresh(tokenizer, rope_scaling=scaling, context=4096, hidden_size=128)
    save_checkpoint(tmp_path, model, tokenizer)
    assert load_checkpoint(tmp_path).config == model.config
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, model.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    for first in (0, 500, 4056):
        positions = torch.arange(first, first + 40)[None]
        with torch.no_grad():
            wanted = stock(tokens, position_ids=positions).logits
            torch.testing.assert_close(model(tokens, positions=positions), wanted, atol=1e-4, rtol=0)
    plain = fresh(tokenizer, context=4096, hidden_size=128)
    with torch.no_grad():
        assert (plain(tokens, positions=positions) - wanted).abs().max() > 1e-2  # the scaling is seen at all


def test_configs_of_old_versions_of_transformers_give_the_same_model(tokenizer: Path, tmp_path: Path) -> None:
    scaling = {"kind": "llama3", "factor": 8.0, "original_context": 64}
    model = fresh(tokenizer, tied=False, kv_heads=4, rope_scaling=scaling)
    save_checkpoint(tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for left_out in ("tie_word_embeddings", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "hidden_act"):
        del config[left_out]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    config["torch_dtype"], config["pretraining_tp"] = config.pop("dtype"), 1
    del config["rope_scaling"]["original_max_position_embeddings"]  # then it is max_position_embeddings
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = load_checkpoint(tmp_path)
    assert opened.config == model.config
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits, opened(TOKENS), atol=1e-5, rtol=1e-5)


def test_shards_that_transformers_wrote_are_opened(tokenizer: Path, tmp_path: Path) -> None:
    model = fresh(tokenizer, tied=False)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for (name, weight), (_, wanted) in zip(
        load_checkpoint(tmp_path / "theirs").named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, wanted), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_above_the_size_of_a_shard_is_saved_in_shards_that_transformers_opens(
    tokenizer: Path, tmp_path: Path, tied: bool
) -> None:
    model = fresh(tokenizer, tied=tied).eval()
    save_checkpoint(tmp_path, model, tokenizer, shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 2 and shards == [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    held = [load_file(tmp_path / name) for name in shards]
    assert all(len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 for tensors in held)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, tensors in zip(shards, held, strict=True) for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensors in held for tensor in tensors.values())
    opened, stock = load_checkpoint(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(TOKENS), model(TOKENS))
        torch.testing.assert_close(stock(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-5)


def test_a_save_that_breaks_off_between_shards_leaves_no_model_not_even_the_one_before(
    tokenizer: Path, tmp_path: Path
) -> None:
    model = fresh(tokenizer)
    save_checkpoint(tmp_path, model, tokenizer, shard_bytes=20_000)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 70_000  # more than fp16 can store, in one of the last shards
    with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.weight: expected weights within 65,504, .* got 70,000"):
        save_checkpoint(tmp_path, model, tokenizer, dtype=torch.float16, shard_bytes=10_000)
    assert list(tmp_path.glob("model-*.safetensors"))  # it was in the middle of it
    with pytest.raises(InputError, match=r"expected weights in model\.safetensors, or in shards .* got no such file"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_missing_shard_is_refused_by_its_name(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer, shard_bytes=20_000)
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(InputError, match=rf"{first.name}: expected a file, since model.safetensors.index.json names it"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "weights.bin"])
def test_an_index_that_points_elsewhere_is_refused(tokenizer: Path, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(InputError, match=r"weight_map: expected names of .* files beside it, got"):
        load_checkpoint(tmp_path)


def test_pickled_weights_are_never_opened(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected weights in model\.safetensors, .* got only pytorch_model\.bin, a pickle"):
        load_checkpoint(tmp_path)


def test_a_truncated_weights_file_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: expected a whole safetensors file"):
        load_checkpoint(tmp_path)


def test_the_tokens_that_end_an_answer_are_saved(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "first", fresh(tokenizer), tokenizer)
    generation = tmp_path / "first" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": [1, 5]}))
    save_checkpoint(tmp_path / "second", load_checkpoint(tmp_path / "first"), tmp_path / "first")
    assert GenerationConfig.from_pretrained(tmp_path / "second").eos_token_id == [1, 5]
    assert TextTokenizer.load(tmp_path / "second").ends == (1, 5)


def test_weights_of_another_shape_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(tokenizer), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        InputError,
        match=r"model\.layers\.2\..*: expected shape .*, got no such weight: the weights are not those of its config",
    ):
        load_checkpoint(tmp_path)


def test_weights_have_the_read_permissions_of_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_open_checkpoint_takes_no_more_address_space_than_its_files(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=24)
    size = (folder / "model.safetensors").stat().st_size
    load_checkpoint(folder, dtype=None)  # imports what it needs
    before = psutil.Process().memory_info().vms
    model = load_checkpoint(folder, dtype=None)
    assert psutil.Process().memory_info().vms - before < 4 * size + 2**24  # not once for each of its 200 tensors
    changed = model.layers[0].mlp.up_proj.weight.data.add_(1)  # type: ignore[operator, union-attr]  # a linear layer
    again = load_checkpoint(folder, dtype=None).layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    assert torch.equal(changed, again + 1)  # the file is as it was
