"""Tiny models of every family, with the options that it may have, and stock Transformers' models with the same weights.

Windows and original contexts are shorter than the rows that the tests compute, so that each part of them matters.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.models import architectures
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder

VOCABULARY = 61
CONTEXT = 64
SIZES = {"hidden_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 40, "context": CONTEXT}
YARN = {"kind": "yarn", "factor": 4.0, "original_context": 16, "fast": 8.0, "slow": 2.0}
LINEAR = {"kind": "linear", "factor": 2.0}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 16}
SLIDING = {"pattern": ["window", "full"], "window": 9}
# The fields of a recipe's table for each case; the first word of its name is the family.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"options": {"attention_bias": "all", "mlp_bias": True}, "tied": False},
    "llama with linear": {"rope_scaling": LINEAR},
    "llama with llama3": {"rope_scaling": LLAMA3},
    "llama with yarn": {"rope_scaling": YARN},
    "llama with dynamic": {"rope_scaling": {"kind": "dynamic", "factor": 4.0}},
    "mistral": {"head_size": 16},
    "mistral with a window": {"options": {"pattern": ["window"], "window": 9}},
    "qwen2": {},
    "qwen2 with windows": {"layers": 3, "options": {"pattern": ["full", "window", "window"], "window": 9}, "tied": False},
    "qwen3": {"head_size": 16},
    "qwen3 with yarn and windows": {"rope_scaling": YARN | {"attention_factor": 1.3}, "options": SLIDING},
    "qwen3 with biases": {"options": {"attention_bias": "all"}, "tied": False},
    "smollm3": {"layers": 4},
    "smollm3 with other layers": {"layers": 3, "options": {"pattern": ["unrotated", "full"]}, "rope_scaling": YARN},
    "granite": {
        "options": {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.1, "logit_divisor": 4.0},
    },
    "phi3": {"tied": False},
    "phi3 with longrope": {
        "rope_scaling": {
            "kind": "longrope",
            "short_divisors": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_divisors": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
            "original_context": 16,
        },
    },
    "phi3 with a part of heads": {"options": {"rotary_share": 0.5}},
    "phi3 with a window": {"options": {"pattern": ["window"], "window": 9}},
    "olmo2": {"head_size": 12},
    "olmo3": {"layers": 5, "head_size": 12, "options": {"window": 9, "window_rope_base": 5000.0}, "rope_scaling": YARN},
    "olmo3 with other layers": {"options": SLIDING | {"window_rope_base": 300.0}, "tied": False},
    "glm": {"tied": False},
    "glm with larger heads": {"head_size": 16},
    "glm4": {"head_size": 16},
    "glm4 without biases": {"options": {"attention_bias": "none", "rotary_share": 1.0}},
    "ministral3": {"head_size": 16, "options": {"query_growth": 0.5}, "rope_scaling": YARN},
    "ministral3 with a window": {"options": {"pattern": ["window"], "window": 9}, "tied": False},
    "gemma3_text": {"layers": 7, "head_size": 16, "options": {"window": 9}, "rope_scaling": LINEAR},
    "gemma3_text with other layers": {
        "options": SLIDING | {"window_rope_base": 300.0, "attention_scale": 24**-0.5},
        "tied": False,
    },
    "gemma2": {"layers": 3, "head_size": 16, "options": {"window": 9, "attention_softcap": 2.0, "final_softcap": 1.5}},
    "gemma2 without caps": {"options": {"window": 9, "attention_softcap": 0.0, "final_softcap": 0.0}},
}

CASES |= {name: {} for name in architectures() if name not in CASES}


def config_of(case: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.model_validate(
        {"name": case.partition(" ")[0], "rope_base": 5000.0, "norm_eps": 1e-4} | SIZES | CASES[case] | changes
    )


def drawn(config: DecoderConfig, *, vocab_size: int = VOCABULARY) -> Decoder:
    """A model whose weights are drawn so that every part matters: logits and scores of attention are about 1."""
    model = architectures()[config.name].build(config, vocab_size=vocab_size)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            lowest = -0.5 if config.parts.norm_weight == "1 + w" else 0.5
            weight.data.uniform_(lowest, lowest + 1, generator=generator)
        elif weight.dim() == 1:
            weight.data.normal_(std=0.5, generator=generator)
        else:
            scale = config.embedding_scale if name.endswith("embed_tokens.weight") else 1.0
            weight.data.normal_(std=1 / scale / math.sqrt(weight.shape[1]), generator=generator)
    return model.eval()


def stock_of(model: Decoder) -> PreTrainedModel:
    """Transformers' own model of this type, with the same weights."""
    fields = architectures()[model.config.name].to_transformers(model.config)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, **special, vocab_size=model.vocab_size)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert type(twin).__name__ == fields["architectures"][0]
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@cache
def pair(case: str) -> tuple[Decoder, PreTrainedModel]:
    """A model and its stock twin. Tests leave nothing in them but gradients."""
    model = drawn(config_of(case))
    return model, stock_of(model)


def tokens(rows: int, length: int, *, vocab_size: int = VOCABULARY) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
