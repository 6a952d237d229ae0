"""Gemma 2 (Riviere et al. 2024): four norms a layer that multiply by 1 + w, a GELU gate, scaled embeddings, windows on every
other layer, and caps on scores and logits.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llm.errors import InputError
from llm.models.families.windowed import Windowed
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter

CAPS = {"attention_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}  # -> in config.json


class Gemma2(Windowed):
    """Gemma 2."""

    name = "gemma2"
    transformers_class = "Gemma2ForCausalLM"
    every = 2
    own = Options(
        norms="around",
        norm_weight="1 + w",
        gate="gelu",
        embedding_scale="sqrt",
        pattern=("window", "full"),
        window=4096,
        attention_softcap=50.0,
        final_softcap=30.0,
    )
    missing = {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    free = Windowed.free | {"attention_scale", *CAPS}
    unset: ClassVar[tuple[str, ...]] = ("quantization_config", "auto_map", "use_bidirectional_attention")
    gguf_architecture = "gemma2"
    gguf_options = frozenset({"window", *CAPS})

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        caps = {field: getattr(self.own, cap) or None for cap, field in CAPS.items()}
        return super().fields_of({**caps, **found})  # null means none

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        size = known["query_pre_attn_scalar"]
        return super().options_of(known) | {
            "attention_scale": None if size == known["head_dim"] else size**-0.5,
            **{cap: known.get(field, 0.0) for cap, field in CAPS.items()},
        }

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return super().fields_for(options, config) | {
            "query_pre_attn_scalar": query_size(options, config.head_size),
            **{field: getattr(options, cap) or None for cap, field in CAPS.items()},
        }

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if options.attention_scale not in (None, query_size(options, 1) ** -0.5):
            return f"attention_scale: expected 1 / sqrt(n) of a whole number n, got {options.attention_scale}"
        return super().fault_of(options, config)

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        super().write_gguf(writer, config)
        for cap in CAPS if self.own.final_softcap else ():
            if not getattr(config.parts, cap):
                raise InputError(f"{cap}: expected a number above 0, as llama.cpp has it in every {self.name}, got 0")
        if self.own.final_softcap:
            writer.add_attn_logit_softcapping(config.parts.attention_softcap)
            writer.add_final_logit_softcapping(config.parts.final_softcap)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        caps = {field: float(found.get(field, getattr(self.own, cap))) or None for cap, field in CAPS.items()}
        return super().gguf_fields(found, known) | {"query_pre_attn_scalar": known["head_dim"], **caps}


def query_size(options: Options, head_size: int) -> int:
    """`query_pre_attn_scalar`: scores are divided by its square root."""
    return head_size if options.attention_scale is None else round(options.attention_scale**-2)
