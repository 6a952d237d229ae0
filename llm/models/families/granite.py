"""Granite 3 and 4 without experts (IBM 2024): LLaMA with a scale on embeddings, on scores, on each branch, and on logits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm.models.families.family import Family, all_or_no_biases
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Our options, and their names in config.json.
SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}


class Granite(Family):
    """Granite, dense."""

    name = "granite"
    transformers_class = "GraniteForCausalLM"
    missing = dict.fromkeys(SCALES.values(), 1.0)
    free = frozenset({*SCALES, "attention_bias", "mlp_bias"})
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "granite"
    gguf_interleaved = True
    gguf_options = frozenset(SCALES)

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        head_size = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
        scales = {option: float(known[field]) for option, field in SCALES.items()}
        if scales["attention_scale"] == head_size**-0.5:
            del scales["attention_scale"]
        return {
            **scales,
            "attention_bias": "all" if known.get("attention_bias") else "none",
            "mlp_bias": known.get("mlp_bias", False),
        }

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        scales = {field: getattr(options, option) for option, field in SCALES.items()}
        scales["attention_multiplier"] = options.attention_scale or config.head_size**-0.5
        return {**scales, "attention_bias": options.attention_bias == "all", "mlp_bias": options.mlp_bias}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if options.embedding_scale == "sqrt":
            return 'embedding_scale: expected a number, as in a config.json of granite, got "sqrt"'
        return all_or_no_biases(self.name, options) or super().fault_of(options, config)

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.parts.residual_scale)
        writer.add_attention_scale(config.parts.attention_scale or config.head_size**-0.5)
        writer.add_logit_scale(config.parts.logit_divisor)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        names = {
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        }
        return {field: float(found[name]) for name, field in names.items() if name in found}
