"""The kind `merge`: a checkpoint and adapters become a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm.adapters import lora
from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe
from runner.artifacts import Checkpoint
from runner.stage import Context
from runner.stages.merge import Merge


@torch.no_grad()
def test_the_merged_checkpoint_in_stock_transformers_equals_base_and_adapter(
    tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = train_bpe(["heart"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    tokenizer.save(tmp_path / "tokenizer")
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, context=32), vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "base", model.eval(), tmp_path / "tokenizer")
    lora.attach(model, lora.LoraConfig(r=2, alpha=4), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.1)
    lora.save_adapter(tmp_path / "adapter", model)

    context = make_context(
        inputs={"base": tmp_path / "base", "tuned": tmp_path / "adapter"},
        records={"base": {"digest": "01"}, "tuned": {"inputs": {"base": {"digest": "01"}}}},
    )
    metrics = Merge.model_validate({"base": "base", "adapters": ["tuned"]}).run(context)
    assert metrics == {"adapters": 1}
    tokens = torch.arange(20)[None]
    stock = AutoModelForCausalLM.from_pretrained(context.work)
    torch.testing.assert_close(stock(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    assert (load_checkpoint(tmp_path / "base")(tokens) - model(tokens)).abs().max() > 0.05

    merged, base = Checkpoint(context.work), Checkpoint(tmp_path / "base")
    assert json.loads(merged.config.read_text()) == json.loads(base.config.read_text())
    assert merged.tokenizer.model.read_bytes() == base.tokenizer.model.read_bytes()
    assert merged.tokenizer.config.read_bytes() == base.tokenizer.config.read_bytes()


@pytest.mark.parametrize(("wanted", "stored"), [("base", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")])
def test_a_merged_checkpoint_keeps_the_precision_of_its_base_unless_another_is_asked_for(
    tmp_path: Path, make_context: Callable[..., Context], wanted: str, stored: str
) -> None:
    train_bpe(["heart"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(tmp_path / "tokenizer")
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=32, layers=1, heads=4, context=32), vocab_size=300)
    save_checkpoint(tmp_path / "base", model, tmp_path / "tokenizer", dtype=torch.bfloat16)
    base = load_checkpoint(tmp_path / "base")
    exact = base.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    lora.attach(base, lora.LoraConfig(r=2, alpha=4), seed=0)
    change = torch.zeros(())
    for name, weight in base.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    for name, layer in lora.adapted_layers(base):
        if name.endswith("up_proj"):
            change = layer.get_delta_weight("default").detach()
    lora.save_adapter(tmp_path / "adapter", base)
    context = make_context(
        inputs={"base": tmp_path / "base", "tuned": tmp_path / "adapter"},
        records={"base": {"digest": "01"}, "tuned": {"inputs": {"base": {"digest": "01"}}}},
    )
    Merge.model_validate({"base": "base", "adapters": ["tuned"], "dtype": wanted}).run(context)
    weights = load_file(context.work / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{stored}"}
    assert json.loads((context.work / "config.json").read_text())["dtype"] == stored
    merged = (exact + change).to(getattr(torch, stored))  # added in fp32, rounded once
    torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"], merged, atol=0, rtol=0)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    context = make_context(
        inputs={"base": tmp_path / "base", "tuned": tmp_path / "adapter"},
        records={"base": {"digest": "01"}, "tuned": {"inputs": {"chat": {"digest": "02"}}}},
    )
    with pytest.raises(InputError, match="expected an adapter trained on 'base', but 'tuned' was trained on chat"):
        Merge.model_validate({"base": "base", "adapters": ["tuned"]}).run(context)
