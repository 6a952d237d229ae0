"""Adapters on the hand-written model: what learns, what is saved, and that stock PEFT opens it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import tiny_model, tiny_training
from torch import Tensor

from llm.adapters import lora
from llm.adapters.frozen import FrozenLinear
from llm.adapters.merge import merge_adapters
from llm.errors import InputError
from llm.layers.dropout import set_counters
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.models.interface import count_parameters
from llm.tokenizer.train_bpe import train_bpe
from llm.training.config import Budget

KINDS = [
    {},
    {"rslora": True},
    {"dora": True},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "mlp.up_proj", "layers.0.mlp.down_proj"]},
]
HEADS = [["lm_head"], ["lm_head", "q_proj", "mlp.down_proj"]]
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def model_of(layers: int = 2, tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(hidden_size=64, layers=layers, heads=4, kv_heads=2, context=32, tied=tied)
    return Decoder(config, vocab_size=300).eval()


def settings_of(**changes: Any) -> lora.LoraConfig:
    return lora.LoraConfig(**{"r": 4, "alpha": 8, **changes})


def tokens_of(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(300, (rows, 16), generator=torch.Generator().manual_seed(seed))


def train(model: Decoder, steps: int = 6) -> list[float]:
    """Losses while `model` learns one batch by heart."""
    tokens = tokens_of()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    model.train()
    for step in range(steps):
        set_counters(model, seed=0, step=step, rows=torch.arange(len(tokens)))
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model with a tokenizer, as stock Transformers opens it."""

    def write(model: Decoder) -> Path:
        folder = tmp_path / "base"
        tokenizer = train_bpe(["heart and liver"], 300, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True)
        tokenizer.save(tmp_path / "tokenizer")
        save_checkpoint(folder, model, tmp_path / "tokenizer")
        return folder

    return write


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks Transformers for it
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        *((kind, tied) for kind in KINDS for tied in (True, False)),
        *(({"target_modules": names, "dora": dora, "dropout": 0.0}, False) for names in HEADS for dora in (True, False)),
    ],
)
def test_stock_peft_opens_the_adapter_on_the_stock_base_and_gives_the_same_logits(
    kind: dict[str, Any], tied: bool, base: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = model_of(tied=tied)
    folder = base(model)
    plain = model(tokens_of(1))
    lora.attach(model, settings_of(**{"dropout": 0.1} | kind), seed=1)
    with torch.enable_grad():
        train(model)
    lora.save_adapter(tmp_path / "adapter", model)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    logits = stock(tokens_of(1)).logits
    torch.testing.assert_close(logits, model(tokens_of(1)), atol=1e-4, rtol=0)
    assert (logits - plain).abs().max() > 0.1  # the adapter does something

    reopened = load_checkpoint(folder)
    lora.load_adapter(reopened, tmp_path / "adapter")
    torch.testing.assert_close(reopened(tokens_of(1)), model(tokens_of(1)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks Transformers for it
@pytest.mark.parametrize("tied", [True, False])
def test_modules_trained_in_full_learn_and_open_in_stock_peft_and_are_merged(
    tied: bool, base: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = model_of(tied=tied)
    folder = base(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    lora.attach(model, settings_of(modules_to_save=["embed_tokens", "norm"]), seed=1)
    train(model)
    changed = {name for name, weight in model.named_parameters() if name in before and not torch.equal(weight, before[name])}
    assert changed == {"model.embed_tokens.weight", "model.norm.weight"}  # of a name, the end after a dot: no other norm
    lora.save_adapter(tmp_path / "adapter", model)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    reopened, merged, copied = (load_checkpoint(folder) for _ in range(3))
    lora.load_adapter(reopened, tmp_path / "adapter")
    merge_adapters(merged, [tmp_path / "adapter"])
    lora.copy_adapter(model, copied)
    names = list(model_of(tied=tied).state_dict())
    with torch.no_grad():
        expected = model(tokens_of(1))
        for other in (stock(tokens_of(1)).logits, reopened(tokens_of(1)), merged(tokens_of(1)), copied(tokens_of(1))):
            torch.testing.assert_close(other, expected, atol=1e-4, rtol=0)
    assert list(merged.state_dict()) == names
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_over_four_bits_modules_are_trained_in_full_too() -> None:
    model = model_of()
    lora.quantize(model, double=True)
    lora.attach(model, settings_of(modules_to_save=["input_layernorm"]), seed=1)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all((layer.input_layernorm.weight != 1).any() for layer in model.model.layers)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["embed_token"], r"got 'embed_token'; did you mean 'embed_tokens'\?"),
        (["lm_head"], "got 'lm_head'; 'lm_head' is tied and learns with 'embed_tokens'"),
        (["layernorm"], "got 'layernorm'"),
        (["q_proj"], "got 'model.layers.0.self_attn.q_proj', which target_modules names too"),
    ],
)
def test_a_module_that_cannot_be_trained_in_full_is_refused_with_the_right_names(wanted: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lora.attach(model_of(), settings_of(modules_to_save=wanted), seed=0)


def test_an_adapter_that_separates_a_tied_head_from_its_embedding_is_refused(tmp_path: Path) -> None:
    model = model_of()
    lora.attach(model, settings_of(modules_to_save=["embed_tokens"]), seed=0)
    lora.save_adapter(tmp_path, model)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] += 1
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="got one of the head or the embedding, which share their weight in this base"):
        lora.load_adapter(model_of(), tmp_path)


def test_a_new_adapter_changes_nothing_and_only_it_learns() -> None:
    model = model_of()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    logits = model(tokens_of())
    lora.attach(model, settings_of(), seed=1)
    torch.testing.assert_close(model(tokens_of()), logits)
    train(model)
    after = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name.rsplit(".", 3)[1] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_parameters_are_counted_as_if_the_base_were_not_quantized() -> None:
    found = []
    for quantized in (False, True):
        model = model_of()
        whole = sum(weight.numel() for weight in model.parameters())
        if quantized:
            lora.quantize(model, double=True)
        lora.attach(model, settings_of(r=4), seed=0)
        found.append((*count_parameters(model), model.flops_per_token(32)))
    # q, o: 64 + 64; k, v: 64 + 32; gate, up, down: 64 + 192; each times the rank, in 2 layers
    learned = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 256)
    assert found == [(learned, whole + learned, found[0][2])] * 2


def test_quantized_training_uses_four_bit_layers_learns_and_saves_an_ordinary_adapter(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit

    model = model_of()
    exact = model(tokens_of())
    lora.quantize(model, double=True)
    four_bit = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(four_bit) == 2 * 7
    assert all(
        layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features // 2
        for layer in four_bit
    )
    difference = (model(tokens_of()) - exact).norm() / exact.norm()
    assert 0.01 < difference < 0.3  # rounded to 16 values, and still nearly the same model

    lora.attach(model, settings_of(dropout=0.1), seed=0)
    assert {type(layer) for _, layer in lora.adapted_layers(model)} == {AdaptedLinear4bit}
    losses = train(model, steps=10)
    assert losses[-1] < losses[0] - 1
    lora.save_adapter(tmp_path, model)
    plain = model_of()
    lora.load_adapter(plain, tmp_path)
    assert (plain(tokens_of()) - model(tokens_of())).norm() / exact.norm() < 0.3


def test_single_and_double_quantization_differ_only_in_the_scales() -> None:
    single, double = model_of(), model_of()
    lora.quantize(single, double=False)
    lora.quantize(double, double=True)
    name = "model.layers.0.mlp.up_proj"
    one, two = single.get_submodule(name).weight, double.get_submodule(name).weight
    assert torch.equal(one.data, two.data)
    assert (one.quant_state.nested, two.quant_state.nested) == (False, True)


def test_dropout_of_an_adapter_depends_on_the_row_and_not_on_its_batch() -> None:
    model = model_of()
    lora.attach(model, settings_of(dropout=0.5), seed=0)
    train(model, steps=2)
    model.train()
    tokens = tokens_of(rows=4)

    def logits(rows: list[int], step: int = 7) -> Tensor:
        set_counters(model, seed=3, step=step, rows=torch.tensor(rows))
        return model(tokens[rows]).detach()

    whole = logits([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat([logits([0, 1]), logits([2, 3])]), whole)
    assert not torch.allclose(logits([0, 1, 2, 3], step=8), whole)
    assert not any(isinstance(module, torch.nn.Dropout) for module in model.modules())


def test_a_new_adapter_depends_only_on_the_seed() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = model_of()
        torch.rand(seed + 5)
        lora.attach(model, settings_of(), seed=seed)
        return {name: weight for name, weight in model.named_parameters() if "lora_A" in name}

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_attaching_leaves_the_global_generator_unchanged() -> None:
    model = model_of()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    lora.attach(model, settings_of(), seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("wanted", "adapted"),
    [
        ("all-linear", [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEAR]),
        (["v_proj"], ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        (["mlp.up_proj", "lm_head"], ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp.down_proj"]),
        # More names than PEFT keeps as they are: it writes fewer that mean the same.
        ([f"model.layers.{layer}.{name}" for layer in (0, 1, 2) for name in LINEAR], None),
    ],
)
def test_a_target_matches_the_linear_layers_whose_names_it_ends(
    wanted: list[str] | str, adapted: list[str] | None, tmp_path: Path
) -> None:
    model = model_of(layers=2 if adapted else 3, tied=False)
    lora.attach(model, settings_of(target_modules=wanted), seed=0)
    assert sorted(name for name, _ in lora.adapted_layers(model)) == sorted(adapted or wanted)
    lora.save_adapter(tmp_path, model)
    again = model_of(layers=len(model.model.layers), tied=False)
    lora.load_adapter(again, tmp_path)
    assert [name for name, _ in lora.adapted_layers(again)] == [name for name, _ in lora.adapted_layers(model)]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (["q_proj", "qproj"], r"got 'qproj'; did you mean 'q_proj'\?"),
        (["mlp.q_proj"], r"got 'mlp.q_proj'; did you mean 'mlp.up_proj'\?"),
        (["model.layers.2.mlp.up_proj"], r"got 'model.layers.2.mlp.up_proj'; did you mean 'model.layers.[01].mlp.up_proj'\?"),
        (["roj"], "got 'roj'"),
        (["embed_tokens"], "got 'embed_tokens'$"),
        (["q_proj", "norm"], "got 'norm'$"),
        (["self_attn"], "got 'self_attn'"),
        (["lmhead"], r"got 'lmhead'; did you mean 'lm_head'\?"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_the_right_names_and_the_nearest(
    wrong: list[str], nearest: str
) -> None:
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, lm_head"
    longer = r"\(or longer ones, as self_attn.q_proj and model.layers.0.self_attn.q_proj\)"
    with pytest.raises(InputError, match=rf"{names} {longer}, .*{nearest}"):
        lora.attach(model_of(tied=False), settings_of(target_modules=wrong), seed=0)


def test_a_tied_head_is_no_target_and_is_not_among_the_right_names() -> None:
    with pytest.raises(InputError, match=r"a head of its own.*'lm_head'.*tied.*the input embedding.*tied = false"):
        lora.attach(model_of(), settings_of(target_modules=["q_proj", "lm_head"]), seed=0)
    with pytest.raises(InputError, match="target_modules: expected") as refused:
        lora.attach(model_of(), settings_of(target_modules=["lmhead"]), seed=0)
    assert "lm_head" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks Transformers for it
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT warns of what is refused here
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_head_or_embedding_made_elsewhere_is_refused(
    name: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = base(model_of())
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=[name, "q_proj"]))
    stock.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: .*tied = false, .*share their weight in this base"):
        lora.load_adapter(load_checkpoint(folder), tmp_path / "adapter")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_adapter_of_a_head_learns_in_the_training_loop(tmp_path: Path, quantized: bool, precision: str) -> None:
    model = tiny_model(tied=False, hidden_size=64)
    if quantized:
        lora.quantize(model, double=True)
    lora.attach(model, settings_of(target_modules=["lm_head"]), seed=0)
    assert type(model.lm_head.get_base_layer()) is FrozenLinear  # never in four bits
    assert type(model.lm_head.get_base_layer().weight) is torch.nn.Parameter
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lines: list[dict[str, Any]] = []
    tiny_training(model, tmp_path, lines=lines, precision=precision, budget=Budget(steps=60))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name].to(weight.dtype))]
    assert changed == ["lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"]


def test_dropout_is_refused_for_the_adapter_of_a_head() -> None:
    with pytest.raises(InputError, match=r"dropout: expected 0 where target_modules names 'lm_head', got 0.1"):
        lora.attach(model_of(tied=False), settings_of(target_modules=["lm_head"], dropout=0.1), seed=0)


def test_the_saved_configuration_names_its_targets_and_no_path(tmp_path: Path) -> None:
    model = model_of()
    lora.attach(model, settings_of(r=2, alpha=6, dropout=0.25, rslora=True), seed=0)
    lora.save_adapter(tmp_path, model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["task_type"], config["peft_type"], config["inference_mode"]) == ("CAUSAL_LM", "LORA", True)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (2, 6, 0.25, True)
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = model_of()
        lora.attach(model, settings_of(), seed=0)
        lora.save_adapter(tmp_path / name, model)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model = model_of(layers=3)
    lora.attach(model, settings_of(), seed=0)
    lora.save_adapter(tmp_path, model)
    with pytest.raises(
        InputError, match=r"model\.layers\.2.*: expected no such weight, as in this base, got shape .*: it adapts another base"
    ):
        lora.load_adapter(model_of(layers=2), tmp_path)
    with pytest.raises(InputError, match=r"model.layers.3.*no such weight"):
        lora.load_adapter(model_of(layers=4), tmp_path)
