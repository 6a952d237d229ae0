"""GLM-4 of 2025 (GLM-4-0414, Z1; Zhipu AI), and GLM-4-9B of 2024 before it: LLaMA with biases on queries, keys and values,
half of each head rotated in pairs of neighbours, and gate and up as one matrix; that of 2025 with norms around each branch.
"""

from collections.abc import Mapping
from typing import Any

from llm.models.families.config_json import read_rope
from llm.models.families.family import Family
from llm.models.options import Options

SHARE = 0.5  # of a head that is rotated


class Glm4(Family):
    """GLM-4-0414 and GLM-Z1, without experts and pictures."""

    name = "glm4"
    transformers_class = "Glm4ForCausalLM"
    own = Options(attention_bias="qkv", fused="gate_up", norms="around", rotary_pairs="neighbours", rotary_share=SHARE)
    missing = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
    }
    free = frozenset({"attention_bias", "rotary_share"})
    rope_kinds = ()
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "glm4"
    gguf_options = frozenset({"rotary_share"})

    def norms_of(self, options: Options) -> tuple[str | None, ...]:  # noqa: D102
        return "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"

    def rope_of(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float, Any]:  # noqa: D102
        return read_rope(found, kinds=(), context=known["max_position_embeddings"], base=10000.0, partial=True)

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        share = (known.get("rope_parameters") or {}).get("partial_rotary_factor", known.get("partial_rotary_factor", SHARE))
        return {"rotary_share": float(share), "attention_bias": "qkv" if known["attention_bias"] else "none"}

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": options.attention_bias == "qkv"}

    def rope_for(self, config: Any) -> dict[str, Any]:  # noqa: D102
        return {**super().rope_for(config), "partial_rotary_factor": config.parts.rotary_share}

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"partial_rotary_factor": found.get("rope.dimension_count", known["head_dim"]) / known["head_dim"]}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if options.attention_bias == "all":
            return f'attention_bias: expected "qkv" or "none", as in a config.json of {self.name}, got "all"'
        return super().fault_of(options, config)
