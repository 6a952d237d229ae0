"""Ministral 3 (Mistral AI 2025): Mistral with YaRN by default, and queries that grow with their position."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm.models.families.config_json import ORIGINAL
from llm.models.families.mistral import Mistral
from llm.models.options import YarnScaling

if TYPE_CHECKING:
    from gguf import GGUFWriter

GROWTH = "llama_4_scaling_beta"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16384, "attention_factor": 1.0, GROWTH: 0.1}


class Ministral3(Mistral):
    """Ministral 3, the text models of 3B, 8B and 14B."""

    name = "ministral3"
    transformers_class = "Ministral3ForCausalLM"
    defaults = {"rope_base": 1e6}
    missing = {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
    free = Mistral.free | {"query_growth"}
    gguf_architecture = "mistral3"
    gguf_options = frozenset({"query_growth"})

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        given = {name: value for name, value in found.items() if value is not None}
        return super().fields_of({"sliding_window": None, "rope_parameters": YARN, **given})

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        growth = float((known.get("rope_scaling") or known["rope_parameters"]).get(GROWTH) or 0.0)
        return super().options_of(known) | {"query_growth": growth}

    def rope_for(self, config: Any) -> dict[str, Any]:  # noqa: D102
        # Transformers wants both, also where nothing grows.
        return {ORIGINAL: config.context, **super().rope_for(config), GROWTH: config.parts.query_growth}

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        if config.parts.query_growth:
            assert isinstance(config.rope_scaling, YarnScaling)  # the configuration is checked
            writer.add_attn_temperature_scale(config.parts.query_growth)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        growth = float(found.get("attention.temperature_scale", 0.0))
        return {"rope_scaling": {"rope_type": "default", **(known["rope_scaling"] or {}), GROWTH: growth}}
