"""OLMo 2 (Walsh et al. 2025): what a branch adds is normalized, not what it reads; queries and keys are, over all heads."""

from collections.abc import Mapping
from typing import Any

from llm.models.families.family import Family, all_or_no_biases
from llm.models.options import Options


class Olmo2(Family):
    """OLMo 2."""

    name = "olmo2"
    transformers_class = "Olmo2ForCausalLM"
    own = Options(qk_norm="whole", norms="after")
    defaults = {"rope_base": 5e5}
    missing = {"rms_norm_eps": 1e-5}
    free = frozenset({"attention_bias"})
    unset = ("quantization_config", "auto_map")
    gguf_architecture = "olmo2"
    gguf_ties = False

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": "all" if known.get("attention_bias") else "none"}

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {"attention_bias": options.attention_bias == "all"}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        return all_or_no_biases(self.name, options) or super().fault_of(options, config)
