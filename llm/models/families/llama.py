"""LLaMA (Touvron et al. 2023): Llama 2 and 3, SmolLM 1 and 2, TinyLlama, Yi, Falcon3, MiniCPM5, and many others.

InternLM3 and EXAONE 3 are computed by LLaMA's code in Transformers, too: an imported one is written as a LLaMA.
"""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Family, all_or_no_biases
from llm.models.options import Options


class Llama(Family):
    """LLaMA."""

    name = "llama"
    transformers_class = "LlamaForCausalLM"
    free = frozenset({"attention_bias", "mlp_bias"})
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
