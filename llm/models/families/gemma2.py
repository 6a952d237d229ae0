"""Gemma 2 (Riviere et al. 2024): four norms a layer that multiply by 1 + w, a GELU gate, scaled embeddings, windows on every
other layer, and caps on scores and logits.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm.errors import InputError
from llm.models.families.family import Family, all_or_no_biases, layer_types, read_pattern
from llm.models.families.gemma3_text import query_size, scale_fault
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter

WINDOW = 4096


class Gemma2(Family):
    """Gemma 2."""

    name = "gemma2"
    transformers_class = "Gemma2ForCausalLM"
    own = Options(
        norms="around",
        norm_weight="1 + w",
        gate="gelu",
        embedding_scale="sqrt",
        pattern=("window", "full"),
        window=WINDOW,
        attention_softcap=50.0,
        final_softcap=30.0,
    )
    missing = {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": WINDOW,
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    free = frozenset({"pattern", "window", "attention_scale", "attention_bias", "attention_softcap", "final_softcap"})
    unset = ("quantization_config", "auto_map", "use_bidirectional_attention")
    gguf_architecture = "gemma2"
    gguf_options = frozenset({"window", "attention_softcap", "final_softcap"})

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(known["num_hidden_layers"])]
        size = known["query_pre_attn_scalar"]
        return {
            "pattern": read_pattern(known, otherwise=types),
            "window": known["sliding_window"],
            "attention_scale": None if size == known["head_dim"] else size**-0.5,
            "attention_bias": "all" if known.get("attention_bias") else "none",
            "attention_softcap": known.get("attn_logit_softcapping", 0.0),
            "final_softcap": known.get("final_logit_softcapping", 0.0),
        }

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return super().fields_of({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **found})  # null means none

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {
            "attention_bias": options.attention_bias == "all",
            "layer_types": layer_types(config.kinds),
            "sliding_window": options.window or WINDOW,
            "query_pre_attn_scalar": query_size(options, config.head_size),
            "attn_logit_softcapping": options.attention_softcap or None,
            "final_logit_softcapping": options.final_softcap or None,
        }

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if "unrotated" in options.pattern:
            return 'pattern: expected "full" and "window", as in a config.json of gemma2, got "unrotated"'
        return scale_fault(options) or all_or_no_biases(self.name, options) or super().fault_of(options, config)

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        writer.add_sliding_window(config.parts.window or WINDOW)
        for cap in ("attention_softcap", "final_softcap"):
            if not getattr(config.parts, cap):
                raise InputError(f"{cap}: expected a number above 0, as llama.cpp has it in every gemma2, got 0")
        writer.add_attn_logit_softcapping(config.parts.attention_softcap)
        writer.add_final_logit_softcapping(config.parts.final_softcap)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {
            "query_pre_attn_scalar": known["head_dim"],
            "sliding_window": found.get("attention.sliding_window", WINDOW),
            "attn_logit_softcapping": float(found.get("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": float(found.get("final_logit_softcapping", 30.0)),
        }
