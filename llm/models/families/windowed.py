"""What families with windows on most of their layers share (Gemma 2 and 3, OLMo 3); it is none itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llm.models.families.config_json import ORIGINAL, read_rope, refused, write_rope
from llm.models.families.family import Family, all_or_no_biases, layer_types, read_pattern
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Windowed(Family):
    """Windows on all but each `every`th layer, with a rotary embedding of their own where `own.window_rope_base` is set."""

    every: ClassVar[int]
    missing_window: ClassVar[int] = 4096  # where config.json has none
    free = frozenset({"pattern", "window", "attention_bias"})
    unset: ClassVar[tuple[str, ...]] = ("quantization_config", "auto_map")
    gguf_options = frozenset({"window", "window_rope_base"})

    def rope_of(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float, Any]:  # noqa: D102
        if self.own.window_rope_base is None:
            return super().rope_of(found, known)
        everything = (found.get("rope_parameters") or {}).get("full_attention") or {}
        fields = {name: found.get(name) for name in ("rope_theta", "rope_scaling", ORIGINAL)} | {"rope_parameters": everything}
        context = known["max_position_embeddings"]
        return read_rope(fields, kinds=self.rope_kinds, context=context, base=self.defaults["rope_base"])

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        layers, every = known["num_hidden_layers"], known.get("sliding_window_pattern", self.every)
        types = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
        options: dict[str, Any] = {
            "pattern": read_pattern(known, otherwise=types),
            "window": known.get("sliding_window", self.missing_window),
            "attention_bias": "all" if known.get("attention_bias") else "none",
        }
        if self.own.window_rope_base is not None:
            sliding = (known.get("rope_parameters") or {}).get("sliding_attention") or {}
            if (kind := sliding.get("rope_type", "default")) != "default":
                raise refused("rope_parameters.sliding_attention.rope_type", "'default'", kind)
            base = sliding.get("rope_theta") or known.get("rope_local_base_freq", self.own.window_rope_base)
            options["window_rope_base"] = float(base)
        return options

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:  # noqa: D102
        return {
            "attention_bias": options.attention_bias == "all",
            "layer_types": layer_types(config.kinds),
            "sliding_window": options.window or self.own.window,
        }

    def rope_for(self, config: Any) -> dict[str, Any]:  # noqa: D102
        if self.own.window_rope_base is None:
            return super().rope_for(config)
        return {
            "full_attention": write_rope(config.rope_base, config.rope_scaling),
            "sliding_attention": write_rope(config.parts.window_rope_base or self.own.window_rope_base, None),
        }

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:  # noqa: D102
        if "unrotated" in options.pattern:
            return f'pattern: expected "full" and "window", as in a config.json of {self.name}, got "unrotated"'
        if self.own.window_rope_base and options.window is not None and options.window_rope_base is None:
            return f"window_rope_base: expected a number, as in a config.json of {self.name}, got none"
        return all_or_no_biases(self.name, options) or super().fault_of(options, config)

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        assert self.own.window is not None
        writer.add_sliding_window(config.parts.window or self.own.window)
        if self.own.window_rope_base is not None:
            writer.add_rope_freq_base_swa(config.parts.window_rope_base or self.own.window_rope_base)

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        fields = {"sliding_window": found.get("attention.sliding_window", self.own.window)}
        if self.own.window_rope_base is not None:
            fields["rope_local_base_freq"] = float(found.get("rope.freq_base_swa", self.own.window_rope_base))
        return fields
