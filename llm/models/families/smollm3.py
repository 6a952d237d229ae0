"""SmolLM3 (Bakouch et al. 2025): LLaMA without rotary positions on each fourth layer (Yang et al. 2025)."""

from collections.abc import Mapping
from typing import Any

from llm.errors import InputError
from llm.models.families.family import Family, all_or_no_biases
from llm.models.options import Options, shortest


class SmolLM3(Family):
    """SmolLM3."""

    name = "smollm3"
    transformers_class = "SmolLM3ForCausalLM"
    own = Options(pattern=("full", "full", "full", "unrotated"))
    defaults = {"rope_base": 2e6}
    missing = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "default_theta": 2e6,
        "no_rope_layer_interval": 4,
    }
    free = frozenset({"pattern", "attention_bias", "mlp_bias"})
    fixed = {"use_sliding_window": False}
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "smollm3"
    gguf_interleaved = True

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        layers, every = known["num_hidden_layers"], known["no_rope_layer_interval"]
        rotated = known.get("no_rope_layers") or [(layer + 1) % every for layer in range(layers)]  # 0 where there is none
        if len(rotated) < layers:
            raise InputError(f"no_rope_layers: expected a number for each of {layers} layers, got {len(rotated)}")
        return {
            "pattern": shortest(tuple("full" if rotated[layer] else "unrotated" for layer in range(layers))),
            "attention_bias": "all" if known.get("attention_bias") else "none",
            "mlp_bias": known.get("mlp_bias", False),
        }

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {
            "attention_bias": options.attention_bias == "all",
            "mlp_bias": options.mlp_bias,
            "no_rope_layers": [int(kind != "unrotated") for kind in config.kinds],
            "layer_types": ["full_attention"] * config.layers,
            "sliding_window": None,
        }

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if "window" in options.pattern:
            return 'pattern: expected "full" and "unrotated", got "window", which is not computed for SmolLM3'
        return all_or_no_biases(self.name, options) or super().fault_of(options, config)
