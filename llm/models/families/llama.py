"""LLaMA (Touvron et al. 2023): Llama 2 and 3, SmolLM 1 and 2, TinyLlama, Yi, Falcon3, MiniCPM5, and many others.

InternLM3, EXAONE 3 and IQuest-Coder are computed by LLaMA's code in Transformers, too: an imported one is written as a LLaMA.
"""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Alias, Family, all_or_no_biases
from llm.models.options import Options


class Llama(Family):
    """LLaMA."""

    name = "llama"
    transformers_class = "LlamaForCausalLM"
    aliases = {
        "internlm3": Alias(
            {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
            {"max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
        ),
        "exaone": Alias(
            {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
            {"max_position_embeddings": 4096, "num_key_value_heads": 8, "default_theta": 5e5, "rms_norm_eps": 1e-5},
        ),
        "iquestcoder": Alias(
            missing={"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
        ),
    }
    # EXAONE's own, as in Transformers' conversion_mapping.
    renamed_weights = {
        r"^transformer\.wte\.": "model.embed_tokens.",
        r"^transformer\.h\.": "model.layers.",
        r"^transformer\.ln_f\.": "model.norm.",
        r"\.attn\.attention\.out_proj\.": ".self_attn.o_proj.",
        r"\.attn\.attention\.": ".self_attn.",
        r"\.ln_1\.": ".input_layernorm.",
        r"\.ln_2\.": ".post_attention_layernorm.",
        r"\.mlp\.c_fc_0\.": ".mlp.gate_proj.",
        r"\.mlp\.c_fc_1\.": ".mlp.up_proj.",
        r"\.mlp\.c_proj\.": ".mlp.down_proj.",
    }
    free = frozenset({"attention_bias", "mlp_bias"})
    unset = ("quantization_config", "sliding_window", "auto_map", "clip_qkv")
    gguf_architecture = "llama"
    gguf_options = free
    gguf_interleaved = True

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {
            "attention_bias": "all" if known.get("attention_bias") else "none",
            "mlp_bias": known.get("mlp_bias", False),
        }

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": options.attention_bias == "all", "mlp_bias": options.mlp_bias}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        return all_or_no_biases(self.name, options) or super().fault_of(options, config)
