"""Gemma 3, its text models (Kamath et al. 2025): four norms a layer that multiply by 1 + w, norms on heads, a GELU gate,
scaled embeddings, and windows on five of six layers, whose rotary embedding has a base of its own.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm.models.families.config_json import read_rope, refused, write_rope
from llm.models.families.family import Family, all_or_no_biases, layer_types, read_pattern
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter

WINDOW, PATTERN = 512, 6  # of the smallest; each sixth layer sees everything
GLOBAL_BASE, WINDOW_BASE = 1e6, 1e4


class Gemma3Text(Family):
    """Gemma 3 270M and 1B, and the text models inside larger ones."""

    name = "gemma3_text"
    transformers_class = "Gemma3ForCausalLM"
    own = Options(
        qk_norm="head",
        norms="around",
        norm_weight="1 + w",
        gate="gelu",
        embedding_scale="sqrt",
        pattern=("window", "window", "window", "window", "window", "full"),
        window=WINDOW,
        window_rope_base=WINDOW_BASE,
    )
    defaults = {"rope_base": GLOBAL_BASE}
    missing = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": PATTERN,
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    free = frozenset({"pattern", "window", "window_rope_base", "attention_scale", "attention_bias"})
    fixed = {"use_bidirectional_attention": False}
    unset = ("quantization_config", "auto_map", "final_logit_softcapping", "attn_logit_softcapping")
    gguf_architecture = "gemma3"
    gguf_options = frozenset({"window", "window_rope_base"})

    def rope_of(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float, Any]:  # noqa: D102
        everything = (found.get("rope_parameters") or {}).get("full_attention") or {}
        fields = {name: found.get(name) for name in ("rope_theta", "rope_scaling")} | {"rope_parameters": everything}
        return read_rope(fields, kinds=self.rope_kinds, context=known["max_position_embeddings"], base=GLOBAL_BASE)

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        layers, every = known["num_hidden_layers"], known["sliding_window_pattern"]
        types = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
        sliding = (known.get("rope_parameters") or {}).get("sliding_attention") or {}
        if (kind := sliding.get("rope_type", "default")) != "default":
            raise refused("rope_parameters.sliding_attention.rope_type", "'default'", kind)
        size = known["query_pre_attn_scalar"]
        return {
            "pattern": read_pattern(known, otherwise=types),
            "window": known["sliding_window"],
            "window_rope_base": float(sliding.get("rope_theta") or known.get("rope_local_base_freq", WINDOW_BASE)),
            "attention_scale": None if size == known["head_dim"] else size**-0.5,
            "attention_bias": "all" if known.get("attention_bias") else "none",
        }

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {
            "attention_bias": options.attention_bias == "all",
            "layer_types": layer_types(config.kinds),
            "sliding_window": options.window or WINDOW,
            "query_pre_attn_scalar": query_size(options, config.head_size),
        }

    def rope_for(self, config: Any) -> dict[str, Any]:  # noqa: D102
        return {
            "full_attention": write_rope(config.rope_base, config.rope_scaling),
            "sliding_attention": write_rope(config.parts.window_rope_base or WINDOW_BASE, None),
        }

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if "unrotated" in options.pattern:
            return 'pattern: expected "full" and "window", as in a config.json of gemma3_text, got "unrotated"'
        if options.window is not None and options.window_rope_base is None:
            return "window_rope_base: expected a number, as in a config.json of gemma3_text, got none"
        return scale_fault(options) or all_or_no_biases(self.name, options) or super().fault_of(options, config)

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        writer.add_sliding_window(config.parts.window or WINDOW)
        writer.add_rope_freq_base_swa(config.parts.window_rope_base or WINDOW_BASE)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {
            "query_pre_attn_scalar": known["head_dim"],
            "sliding_window": found.get("attention.sliding_window", WINDOW),
            "rope_local_base_freq": float(found.get("rope.freq_base_swa", WINDOW_BASE)),
        }


def query_size(options: Options, head_size: int) -> int:
    """`query_pre_attn_scalar`: scores are divided by its square root."""
    return head_size if options.attention_scale is None else round(options.attention_scale**-2)


def scale_fault(options: Options) -> str | None:
    """What `query_pre_attn_scalar`, a whole number, cannot express."""
    if options.attention_scale in (None, query_size(options, 1) ** -0.5):
        return None
    return f"attention_scale: expected 1 / sqrt(n) of a whole number n, got {options.attention_scale}"
