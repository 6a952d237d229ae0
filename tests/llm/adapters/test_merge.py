"""Merging: the merged model computes what base and adapters computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.adapters import lora
from llm.adapters.merge import MergedWeights, merge_adapters
from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe


def model_of(hidden_size: int = 32, tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(hidden_size=hidden_size, layers=2, heads=4, kv_heads=2, context=32, tied=tied)
    return Decoder(config, vocab_size=50).eval()


def adapter(folder: Path, model: Decoder, *, seed: int, **kind: Any) -> Path:
    """An adapter on `model` that changes it a good deal; its weights are drawn, not learned."""
    lora.attach(model, lora.LoraConfig(r=3, alpha=5, **kind), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
        elif name == "model.norm.weight" and weight.requires_grad:
            weight.data.add_(0.5)
        elif "magnitude" in name:
            weight.data.mul_(1 + 0.2 * torch.rand(weight.shape, generator=generator))
    lora.save_adapter(folder, model)
    return folder


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    found: Tensor = model(torch.arange(20)[None])
    return found


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ["v_proj"]}])
def test_merged_equals_base_plus_adapter(kind: dict[str, Any], tmp_path: Path) -> None:
    adapted = model_of()
    folder = adapter(tmp_path / "adapter", adapted, seed=1, **kind)
    merged = model_of()
    plain = logits(merged)
    merge_adapters(merged, [folder])
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    assert (logits(merged) - plain).abs().max() > 0.05


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_of_a_head_is_merged_into_the_head_and_nothing_else(dora: bool, tmp_path: Path) -> None:
    adapted, merged, plain = (model_of(tied=False) for _ in range(3))
    folder = adapter(tmp_path, adapted, seed=1, target_modules=["lm_head"], dora=dora)
    merge_adapters(merged, [folder])
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    assert type(merged.lm_head) is torch.nn.Linear
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    changed = [name for name, weight in merged.state_dict().items() if not torch.equal(weight, plain.state_dict()[name])]
    assert changed == ["lm_head.weight"]


def test_merging_leaves_an_ordinary_model(tmp_path: Path) -> None:
    folder = adapter(tmp_path, model_of(), seed=1)
    merged = model_of()
    names = list(merged.state_dict())
    merge_adapters(merged, [folder])
    assert list(merged.state_dict()) == names
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_a_chain_is_merged_in_order_each_on_the_result_of_those_before(tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", model_of(), seed=1)
    middle = model_of()
    merge_adapters(middle, [first])
    second = adapter(tmp_path / "second", middle, seed=2, dora=True)  # now `middle` carries the second
    merged = model_of()
    merge_adapters(merged, [first, second])
    torch.testing.assert_close(logits(merged), logits(middle), atol=1e-4, rtol=0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the base, in bf16."""
    tokenizer = train_bpe(["a b c"], 260, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    tokenizer.save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "base", model_of(), tmp_path / "tokenizer", dtype=torch.bfloat16)
    return tmp_path / "base"


def test_weights_that_are_merged_one_by_one_are_those_of_a_whole_merge(base: Path, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{"modules_to_save": ["norm"]}, {"dora": True, "target_modules": ["v_proj", "up_proj"]}, {}]
    chain, whole = [], load_checkpoint(base)
    for number, kind in enumerate(kinds):
        adapted = load_checkpoint(base)
        merge_adapters(adapted, chain)
        chain.append(adapter(tmp_path / str(number), adapted, seed=number, **kind))
    merge_adapters(whole, chain)
    merged = MergedWeights(base, chain)
    for name, weight in whole.named_parameters():
        assert torch.equal(merged(name).float(), weight), name
    save_checkpoint(tmp_path / "merged", merged.model, base, dtype=torch.bfloat16, read=merged)
    save_checkpoint(tmp_path / "whole", whole, base, dtype=torch.bfloat16)
    one, other = (tmp_path / name / "model.safetensors" for name in ("merged", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert merged("model.embed_tokens.weight").dtype == torch.bfloat16  # what no adapter changes stays as it is


def test_a_mix_changes_the_base_by_the_weighted_sum_of_what_each_adapter_changes(base: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", load_checkpoint(base), seed=1, modules_to_save=["norm"])
    second = adapter(tmp_path / "second", load_checkpoint(base), seed=2, dora=True, target_modules=["v_proj", "up_proj"])
    alone = []
    for folder in (first, second):
        alone.append(load_checkpoint(base))
        merge_adapters(alone[-1], [folder])
    mixed, plain = MergedWeights(base, [first, second], [0.7, -0.3]), dict(load_checkpoint(base).named_parameters())
    one, two = (dict(model.named_parameters()) for model in alone)
    for name, weight in plain.items():
        expected = weight + 0.7 * (one[name] - weight) - 0.3 * (two[name] - weight)
        torch.testing.assert_close(mixed(name).float(), expected, atol=1e-6, rtol=0)
    assert not torch.equal(mixed("model.norm.weight").float(), plain["model.norm.weight"])


def test_an_adapter_of_a_base_of_other_sizes_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    folder = adapter(tmp_path, model_of(hidden_size=64), seed=1)
    with pytest.raises(
        InputError, match=r"adapter_model.safetensors: .*: expected shape \(3, .*, got shape \(3, .*: it adapts another base"
    ):
        merge_adapters(model_of(hidden_size=32), [folder])
