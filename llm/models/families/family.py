"""What a family of models is: its options, and their names in Transformers' config.json. No torch here.

The class itself has what most families share with LLaMA; a family is a subclass in a file of its own, which says only what
differs. `llm.models.families.config_json` reads and writes the parts of a `config.json`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from llm.errors import InputError
from llm.models.families.config_json import MOST, SIZES, read_rope, refused, write_rope
from llm.models.options import Kind, Options, shortest

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Transformers' names of the four norms of a layer: of what attention reads, what it adds, and the feed-forward layer likewise.
NORMS: dict[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
LAYER_TYPES: dict[str, Kind] = {"full_attention": "full", "sliding_attention": "window"}


@dataclass(frozen=True)
class Alias:
    """Another `model_type` that a family computes: its fields of other names, and what Transformers takes where one is
    missing."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, Any] = field(default_factory=dict)


class Family:
    """LLaMA and what a subclass changes of it."""

    name: ClassVar[str]  # in recipes, and the `model_type` in config.json
    transformers_class: ClassVar[str]
    aliases: ClassVar[Mapping[str, Alias]] = {}  # by `model_type`; an imported one is written as one of this family
    renamed_weights: ClassVar[
        Mapping[str, str]
    ] = {}  # parts of names of weights in checkpoints of aliases, to those of this family
    own: ClassVar[Options] = Options()
    defaults: ClassVar[Mapping[str, Any]] = {}  # of a recipe's other fields
    free: ClassVar[frozenset[str]] = frozenset()  # options that its config.json can express
    rope_kinds: ClassVar[tuple[str, ...]] = ("linear", "llama3", "yarn", "dynamic", "longrope")
    # What Transformers takes where config.json has no such field.
    missing: ClassVar[Mapping[str, Any]] = {}
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    # Fields with one supported value, and fields that must not be set: each would change the model.
    fixed: ClassVar[Mapping[str, Any]] = {}
    unset: ClassVar[tuple[str, ...]] = ("quantization_config", "sliding_window", "auto_map")
    gguf_architecture: ClassVar[str]
    gguf_marker: ClassVar[str | None] = None  # a field of a GGUF file that tells it from others of the architecture
    gguf_options: ClassVar[frozenset[str]] = frozenset()  # that llama.cpp computes with other values than the family's own
    gguf_ties: ClassVar[bool] = True  # whether llama.cpp takes the embedding for a head that is not in the file
    gguf_interleaved: ClassVar[bool] = False  # whether llama.cpp rotates channel 2i with 2i + 1, not i with i + half

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a `DecoderConfig` in those of a config.json, also of old versions of Transformers.

        InputError names a field that is missing or not supported.
        """
        for name, expected in {self.activation[0]: self.activation[1], **self.fixed}.items():
            if found.get(name, expected) != expected:
                raise refused(name, repr(expected), found[name])
        for name in self.unset:
            if found.get(name) is not None:
                raise refused(name, "nothing", found[name])
        for name in SIZES:
            if not isinstance(size := found.get(name), int) or not 0 < size <= MOST:
                raise InputError(f"{name}: expected a whole number from 1 to {MOST:,}, got {size!r:.80}")
        missing = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **self.missing}
        known = missing | {name: value for name, value in found.items() if value is not None}
        heads = known["num_attention_heads"]
        rope_base, rope_scaling = self.rope_of(found, known)
        return {
            "hidden_size": known["hidden_size"],
            "layers": known["num_hidden_layers"],
            "heads": heads,
            "kv_heads": known.get("num_key_value_heads") or heads,
            "head_size": known.get("head_dim") or known["hidden_size"] // heads,
            "intermediate_size": known["intermediate_size"],
            "context": known["max_position_embeddings"],
            "rope_base": rope_base,
            "rope_scaling": rope_scaling,
            "norm_eps": known["rms_norm_eps"],
            "tied": known["tie_word_embeddings"],
            "options": self.options_of(known),
        }

    def rope_of(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[float, Any]:
        """Base and scaling of the rotary embedding."""
        return read_rope(
            found, kinds=self.rope_kinds, context=known["max_position_embeddings"], base=known.get("default_theta", 10000.0)
        )

    def weight_name(self, name: str) -> str:
        """The name here of a weight in a checkpoint."""
        for old, new in self.renamed_weights.items():
            name = re.sub(old, new, name)
        return name

    def options_of(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The options in the fields of a config.json that differ from its own."""
        return {}

    def norms_of(self, options: Options) -> tuple[str | None, ...]:
        """The names of the four norms of a layer, None where it has none."""
        return NORMS[options.norms]

    def to_transformers(self, config: Any) -> dict[str, Any]:
        """The fields of a config.json for a `DecoderConfig`."""
        return {
            self.activation[0]: self.activation[1],
            **self.fixed,
            **self.fields_for(config.parts, config),
            "architectures": [self.transformers_class],
            "model_type": self.name,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "max_position_embeddings": config.context,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": self.rope_for(config),
            "tie_word_embeddings": config.tied,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }

    def rope_for(self, config: Any) -> dict[str, Any]:
        """Transformers' `rope_parameters`."""
        return write_rope(config.rope_base, config.rope_scaling)

    def fields_for(self, options: Options, config: Any) -> dict[str, Any]:
        """The fields of a config.json that say the options."""
        return {}

    def fault_of(self, options: Options, config: Mapping[str, Any]) -> str | None:
        """What a config.json of this family cannot express in a model of `options` and the sizes `config`; None if it can."""
        for name, own in self.own:
            found = getattr(options, name)
            if found != own and name not in self.free:
                return f"{name}: expected {own!r}, as every {self.name} has it, got {found!r}"
        return None

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:
        """Write the fields of a GGUF file that only this family has."""

    def gguf_fields(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json in those of a GGUF file that only this family has; `known` are the others."""
        return {}


def read_pattern(known: Mapping[str, Any], *, otherwise: list[str]) -> tuple[Kind, ...]:
    """The kinds of layers by `layer_types`, or by default those of `otherwise`."""
    types = known.get("layer_types") or otherwise
    if not isinstance(types, list) or len(types) != known["num_hidden_layers"]:
        raise InputError(f"layer_types: expected one of each of the {known['num_hidden_layers']} layers, got {types!r:.80}")
    for kind in types:
        if kind not in LAYER_TYPES:
            raise refused("layer_types", " and ".join(map(repr, LAYER_TYPES)), kind)
    return shortest(tuple(LAYER_TYPES[kind] for kind in types))


def layer_types(kinds: tuple[Kind, ...]) -> list[str]:
    """Transformers' `layer_types` of layers of these kinds."""
    return ["sliding_attention" if kind == "window" else "full_attention" for kind in kinds]


def all_or_no_biases(name: str, options: Options) -> str | None:
    """The fault of biases on queries, keys and values alone, which `attention_bias` of a config.json cannot say."""
    if options.attention_bias == "qkv":
        return f'attention_bias: expected "none" or "all", as in a config.json of {name}, got "qkv"'
    return None
