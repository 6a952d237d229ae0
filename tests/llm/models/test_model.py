"""The configuration of a LLaMA, and its fresh weights; `test_architectures` compares it with Transformers."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llm.models import architectures
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder

VOCABULARY = 61


def small(**changes: object) -> Decoder:
    sizes = {"hidden_size": 48, "layers": 2, "heads": 4, "intermediate_size": 40, "context": 512}
    torch.manual_seed(0)
    return architectures()["llama"].build(DecoderConfig.model_validate(sizes | changes), vocab_size=VOCABULARY)


def test_fresh_weights_are_xavier_uniform_and_norms_are_one() -> None:
    model = small(tied=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            bound = math.sqrt(6 / sum(weight.shape))  # Glorot and Bengio 2010, equation 16
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


def test_scaled_initialization_shrinks_only_what_writes_into_the_residual_stream() -> None:
    plain, scaled = dict(small().named_parameters()), dict(small(init="scaled").named_parameters())
    for name, weight in scaled.items():
        factor = 1 / math.sqrt(2 * 2) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(weight, plain[name] * factor)


def test_happy_llms_preset_has_215_million_parameters() -> None:
    config = DecoderConfig.model_validate({"preset": "happy-llm-215m", "context": 512})
    with torch.device("meta"):
        model = architectures()["llama"].build(config, vocab_size=6144)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(215e6, rel=0.005)


def test_a_context_that_a_recipe_leaves_open_is_set_before_a_model_is_built() -> None:
    config = DecoderConfig.model_validate({"preset": "2m"})
    with pytest.raises(ValueError, match="context: expected the longest sequence of the model, got None"):
        architectures()["llama"].build(config, vocab_size=VOCABULARY)
    assert config.with_context(24).resolved_context == 24
    assert config.with_context(24).with_context(48).resolved_context == 24


def test_a_preset_is_the_same_as_its_sizes_written_out() -> None:
    written = DecoderConfig.model_validate({"hidden_size": 192, "layers": 4, "heads": 6, "kv_heads": 6, "head_size": 32})
    assert DecoderConfig.model_validate({"preset": "2m"}) == written
    assert DecoderConfig.model_validate({"preset": "2m", "layers": 5}).layers == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 100, "heads": 3}, "hidden_size: expected a multiple of heads, got hidden_size 100 and heads 3"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads: expected a divisor of heads, got heads 6 and kv_heads 4"),
        ({"head_size": 7}, "head_size: expected an even number"),
        ({"preset": "big"}, "preset: expected one of .*happy-llm-215m, got 'big'"),
    ],
)
def test_inconsistent_sizes_are_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.model_validate({"hidden_size": 48, "layers": 1, "heads": 4} | wrong)


@pytest.mark.parametrize(
    "wrong", [{"preset": ["2m"]}, {"preset": 3}, {"preset": "3m"}, {"preset": "2m", "rope_base": math.inf}]
)
def test_a_wrong_preset_or_number_is_a_fault_of_the_recipe(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"preset: expected one of 2m, .*got|rope_base\n.*finite"):
        DecoderConfig.model_validate(wrong)
