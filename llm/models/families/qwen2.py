"""Qwen2 and Qwen2.5 (Qwen team 2024), also of Coder, Math and R1-Distill: LLaMA with biases on queries, keys and values.

Their config.json writes a window and switches it off by another field; where it is on, it slides in the later layers.
"""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Family, layer_types, read_pattern
from llm.models.options import Options


class Qwen2(Family):
    """Qwen2 and Qwen2.5."""

    name = "qwen2"
    transformers_class = "Qwen2ForCausalLM"
    own = Options(attention_bias="qkv")
    defaults = {"rope_base": 1e6}
    missing = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    free = frozenset({"pattern", "window"})
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "qwen2"

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return window_of(known)

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return window_for(options, config)

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        return window_fault(options) or super().fault_of(options, config)


def window_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """The options for windows in the fields of a config.json."""
    if not known.get("use_sliding_window"):
        return {}
    layers, begin = known["num_hidden_layers"], known.get("max_window_layers", 28)
    types = ["sliding_attention" if layer >= begin else "full_attention" for layer in range(layers)]
    pattern = read_pattern(known, otherwise=types)
    return {"pattern": pattern, "window": known.get("sliding_window", 4096) if "window" in pattern else None}


def window_for(options: Options, config: Any) -> dict[str, Any]:
    """The fields of a config.json for them."""
    types, slides = layer_types(config.kinds), options.window is not None
    return {"use_sliding_window": slides, "sliding_window": options.window, "layer_types": types}


def window_fault(options: Options) -> str | None:
    """What the fields cannot express."""
    if "unrotated" in options.pattern:
        return 'pattern: expected "full" and "window", got "unrotated", which a config.json of Qwen cannot express'
    return None
