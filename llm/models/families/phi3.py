"""Phi-3, 3.5, 4 and 4-mini (Abdin et al. 2024): LLaMA with fused projections, LongRoPE, and heads that are rotated in part.

The projections stay fused, as modules of that name: adapters of others attach to them, and nothing is converted.
"""

from collections.abc import Mapping
from typing import Any

from llm.models.families.config_json import ORIGINAL, read_rope
from llm.models.families.family import Family
from llm.models.options import LongRope, Options


class Phi3(Family):
    """The dense Phi models from 3 on."""

    name = "phi3"
    transformers_class = "Phi3ForCausalLM"
    own = Options(fused="all")
    missing = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    free = frozenset({"rotary_share", "pattern", "window"})
    rope_kinds = ("longrope",)
    unset = ("quantization_config",)  # its checkpoints name remote code, which Transformers has had for long
    gguf_architecture = "phi3"
    gguf_options = frozenset({"rotary_share"})

    def rope_of(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float, Any]:  # noqa: D102
        name = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
        rope = dict(found.get(name) or {})
        for key in ("type", "rope_type"):
            if rope.get(key) in ("su", "yarn"):  # as the first checkpoints called it
                rope[key] = "longrope"
        return read_rope(
            {**found, name: rope},
            kinds=self.rope_kinds,
            context=known.get(ORIGINAL, 4096),
            base=10000.0,
            partial=True,
        )

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        rope = known.get("rope_scaling") or known.get("rope_parameters") or {}
        options: dict[str, Any] = {
            "rotary_share": float(rope.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0)))
        }
        window = known.get("sliding_window")
        return options if window is None else options | {"pattern": ("window",), "window": window}

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        scaling = config.rope_scaling
        original = scaling.original_context if isinstance(scaling, LongRope) else config.context
        return {"sliding_window": options.window, ORIGINAL: original, "partial_rotary_factor": options.rotary_share}

    def rope_for(self, config: Any) -> dict[str, Any]:  # noqa: D102
        return {**super().rope_for(config), "partial_rotary_factor": config.parts.rotary_share}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if options.pattern not in (("full",), ("window",)):
            return f'pattern: expected ["full"] or ["window"], as in a config.json of phi3, got {list(options.pattern)!r}'
        return super().fault_of(options, config)
