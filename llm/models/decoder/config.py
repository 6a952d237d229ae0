"""The configuration of a decoder, in a recipe and of a model: its family, sizes and options. No torch here: recipes are
checked without it.

A `preset` is shorthand: its values are filled in and the field itself becomes None, so a preset and the same sizes written out
are the same configuration. `options` becomes None where it says what is the family's own; `parts` has the options in full.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llm.models.families import families
from llm.models.options import Kind, LongRope, Options, RopeScaling, Table, YarnScaling, shortest

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(families())]

PRESETS: dict[str, dict[str, Any]] = {
    "2m": {"hidden_size": 192, "layers": 4, "heads": 6},
    "10m": {"hidden_size": 320, "layers": 6, "heads": 5},
    "25m": {"hidden_size": 512, "layers": 8, "heads": 8},
    "85m": {"hidden_size": 768, "layers": 12, "heads": 12},
    # The shape of Happy-LLM's pretrained model (215M with its vocabulary of 6144), chapter 5 of its book.
    "happy-llm-215m": {"hidden_size": 1024, "layers": 18, "heads": 16, "kv_heads": 8},
}
PLAIN = "llama"  # the family of a recipe that names none


def _without_required(schema: dict[str, Any]) -> None:
    schema.pop("required")  # a preset, or other sizes, stand in for any of the required fields


class DecoderConfig(Table):
    """A decoder of RMSNorm, rotary grouped-query attention and a gated feed-forward layer: every size that decides the
    weights."""

    model_config = ConfigDict(json_schema_extra=_without_required)

    name: FamilyName = PLAIN
    """The architecture: the family of models whose config.json says the same."""
    preset: str | None = None
    """Sizes by name; fields written beside it win. "happy-llm-215m" is the largest."""
    hidden_size: int = Field(gt=0, le=1 << 17)
    """Width of the residual stream."""
    layers: int = Field(gt=0, le=1024)
    """Decoder layers."""
    heads: int = Field(gt=0, le=1024)
    """Query heads."""
    kv_heads: int = Field(gt=0, le=1024)
    """Key and value heads, each shared by heads / kv_heads query heads; default: heads."""
    head_size: int = Field(gt=0, le=1 << 17)
    """Width of a head; default: hidden_size / heads."""
    intermediate_size: int = Field(gt=0, le=1 << 20)
    """Width of the feed-forward layer; default: 8/3 hidden_size, rounded up to a multiple of 64."""
    context: int | None = Field(default=None, gt=0, le=1 << 30)
    """Longest sequence; default: the context of the tokens it is trained on."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding (Su et al. 2021); that of the family by default: 10000 for LLaMA."""
    rope_scaling: RopeScaling | None = None
    """How its frequencies are stretched for a longer context; by default not at all."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in RMSNorm (Zhang and Sennrich 2019)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of channels zeroed on the embeddings and on each residual branch while training."""
    tied: bool = True
    """Whether the output head is the input embedding."""
    init: Literal["xavier", "scaled"] = "xavier"
    """Uniform Xavier; "scaled" also divides what writes into the residual stream by sqrt(2 layers) (GPT-2)."""
    options: Options | None = None
    """How it differs from its family, as far as the family's config.json can say it; by default not at all."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Expand the preset, the family's defaults, and the sizes that follow from others; the fields report wrong types."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
            values = PRESETS[preset] | {name: value for name, value in values.items() if name != "preset"}
        name, hidden, heads = values.get("name", PLAIN), values.get("hidden_size"), values.get("heads")
        filled = (dict(families()[name].defaults) if isinstance(name, str) and name in families() else {}) | values
        if isinstance(heads, int):
            filled.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0:
            if "head_size" not in filled and hidden % heads:
                raise ValueError(f"hidden_size: expected a multiple of heads, got hidden_size {hidden} and heads {heads}")
            filled.setdefault("head_size", hidden // heads)
        if isinstance(hidden, int):
            filled.setdefault("intermediate_size", -(-hidden * 8 // 3 // 64) * 64)
        # Where the fields that these follow from are missing, only those are reported.
        for field in ("kv_heads", "head_size", "intermediate_size"):
            filled.setdefault(field, 1)
        return filled

    @model_validator(mode="after")
    def _sizes_agree(self) -> "DecoderConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads, got heads {self.heads} and kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size: expected an even number, because rotary embeddings turn pairs, got {self.head_size}")
        if self.rotated_size % 2:
            raise ValueError(f"rotary_share: expected one that gives an even number of channels, got {self.rotated_size}")
        if self.parts.query_growth and not isinstance(self.rope_scaling, YarnScaling):
            raise ValueError("rope_scaling: expected one of kind yarn beside a query_growth, got another one or none")
        if self.parts.final_softcap and not self.tied:  # an adapter of such a head would add after the cap
            raise ValueError("tied: expected true beside a final_softcap, got false")
        if self.rope_scaling is not None and self.rope_scaling.kind not in families()[self.name].rope_kinds:
            known = ", ".join(families()[self.name].rope_kinds)
            raise ValueError(f"rope_scaling.kind: expected one of {known}, got {self.rope_scaling.kind!r}")
        if isinstance(self.rope_scaling, LongRope):
            for field in ("short_divisors", "long_divisors"):
                if (found := len(getattr(self.rope_scaling, field))) != self.rotated_size // 2:
                    raise ValueError(
                        f"{field}: expected {self.rotated_size // 2} numbers, one for each frequency, got {found}"
                    )
        return self

    @field_validator("options", mode="before")
    @classmethod
    def _merge_with_those_of_the_family(cls, options: Any, info: ValidationInfo) -> Any:
        if isinstance(options, dict) and "name" in info.data:
            own = families()[info.data["name"]].own
            return {name: getattr(own, name) for name in type(own).model_fields} | options
        return options

    @field_validator("options", mode="after")
    @classmethod
    def _keep_what_differs(cls, options: Options | None, info: ValidationInfo) -> Options | None:
        if options is None or not {"name", "layers"} <= info.data.keys():
            return None
        family = families()[info.data["name"]]
        options = _repeated(options, info.data["layers"])
        if options == _own(family.name, info.data["layers"]):
            return None
        if (fault := family.fault_of(options, info.data)) is not None:
            raise ValueError(fault)
        return options

    @property
    def parts(self) -> Options:
        """Its options, in full."""
        return self.options or _own(self.name, self.layers)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        pattern = self.parts.pattern
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    @property
    def rotated_size(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.parts.rotary_share)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        scale = self.parts.embedding_scale
        return math.sqrt(self.hidden_size) if scale == "sqrt" else scale

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, where scores are divided by sqrt(head_size) as well."""
        scale = self.parts.attention_scale
        return 1.0 if scale is None else scale * math.sqrt(self.head_size)

    @property
    def resolved_context(self) -> int:
        """Longest sequence; ValueError where it is still open."""
        if self.context is None:
            raise ValueError("context: expected the longest sequence of the model, got None; set it by `with_context`")
        return self.context

    def with_context(self, context: int) -> "DecoderConfig":
        """This configuration, with `context` where it leaves that open."""
        return self.model_copy(update={"context": context}) if self.context is None else self


@cache
def _own(family: str, layers: int) -> Options:
    return _repeated(families()[family].own, layers)


def _repeated(options: Options, layers: int) -> Options:
    """`options` with the shortest pattern for so many layers, and with a window only if one of them has it."""
    kinds = tuple(options.pattern[layer % len(options.pattern)] for layer in range(layers))
    window = options.window if "window" in kinds else None
    base = options.window_rope_base if "window" in kinds else None
    return options.model_copy(update={"pattern": shortest(kinds), "window": window, "window_rope_base": base})


def parameter_count(config: DecoderConfig, *, vocab_size: int) -> int:
    """How many weights a model has: embedding, layers, norms, and a head of its own where it is not tied."""
    parts, heads, kv_heads = config.parts, config.heads * config.head_size, config.kv_heads * config.head_size
    biases = {"none": 0, "qkv": heads + 2 * kv_heads, "all": heads + 2 * kv_heads + config.hidden_size}[parts.attention_bias]
    biases += parts.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
    norms = (4 if parts.norms == "around" else 2) * config.hidden_size
    norms += {"none": 0, "head": 2 * config.head_size, "whole": heads + kv_heads}[parts.qk_norm]
    embedding = vocab_size * config.hidden_size
    layer = _layer_matrices(config) + biases + norms
    return embedding * (1 if config.tied else 2) + config.hidden_size + layer * config.layers


def flops_per_token(config: DecoderConfig, *, vocab_size: int, context: int) -> float:
    """Floating-point operations of a forward and backward pass per position of full rows: an estimate.

    6 per weight of a matrix product (the head counts, the embedding does not) and, for scores and mixing, 12 per layer,
    channel and visible position, of which there are context / 2 on average, or fewer in a window.
    """
    products = _layer_matrices(config) * config.layers + vocab_size * config.hidden_size
    return 6.0 * products + attention_flops(config, context=context)


def attention_flops(config: DecoderConfig, *, context: int) -> float:
    """The part of `flops_per_token` for attention scores and mixing."""
    window = min(config.parts.window or context, context)
    visible = {"full": context / 2, "unrotated": context / 2, "window": window - window**2 / (2 * context)}
    return 12.0 * config.heads * config.head_size * sum(visible[kind] for kind in config.kinds)


def _layer_matrices(config: DecoderConfig) -> int:
    attention = 2 * config.hidden_size * config.head_size * (config.heads + config.kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size
