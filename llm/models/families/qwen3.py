"""Qwen3 (Qwen team 2025), and what others train in its form (minimind): LLaMA with norms on each head of queries and keys."""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Family, all_or_no_biases
from llm.models.families.qwen2 import window_fault, window_for, window_of
from llm.models.options import Options


class Qwen3(Family):
    """Qwen3 without experts."""

    name = "qwen3"
    transformers_class = "Qwen3ForCausalLM"
    own = Options(qk_norm="head")
    defaults = {"rope_base": 1e6}
    missing = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
    free = frozenset({"attention_bias", "pattern", "window"})
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "qwen3"

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": "all" if known.get("attention_bias") else "none", **window_of(known)}

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": options.attention_bias == "all", **window_for(options, config)}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        return all_or_no_biases(self.name, options) or window_fault(options) or super().fault_of(options, config)
