"""Mistral (Jiang et al. 2023): LLaMA under its own name, in the first version with a window on all layers."""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Family
from llm.models.options import Options


class Mistral(Family):
    """Mistral 7B and Nemo, but not Ministral 3."""

    name = "mistral"
    transformers_class = "MistralForCausalLM"
    missing = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
    free = frozenset({"pattern", "window"})
    unset = ("quantization_config", "auto_map", "layer_types")
    gguf_architecture = "llama"
    gguf_interleaved = True

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        # Without the field, Transformers' window is 4096; null means none.
        return super().fields_of({"sliding_window": 4096, **found})

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        window = known.get("sliding_window")
        return {} if window is None else {"pattern": ("window",), "window": window}

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {"sliding_window": options.window}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if options.pattern not in (("full",), ("window",)):
            return f'pattern: expected ["full"] or ["window"], as in a config.json of mistral, got {list(options.pattern)!r}'
        return super().fault_of(options, config)
