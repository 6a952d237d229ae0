"""The configuration of a LLaMA, in a recipe and in Transformers' config.json. No torch here: recipes are checked without it.

A `preset` is shorthand: its values are filled in and the field itself becomes None, so a preset and the same sizes written out
are the same configuration.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    "2m": {"hidden_size": 192, "layers": 4, "heads": 6},
    "10m": {"hidden_size": 320, "layers": 6, "heads": 5},
    "25m": {"hidden_size": 512, "layers": 8, "heads": 8},
    "85m": {"hidden_size": 768, "layers": 12, "heads": 12},
    # The shape of Happy-LLM's pretrained model (215M with its vocabulary of 6144), chapter 5 of its book.
    "happy-llm-215m": {"hidden_size": 1024, "layers": 18, "heads": 16, "kv_heads": 8},
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class LinearScaling(_Table):
    """Positions count 1 / factor: a longer context in the range of angles that was trained (Chen et al. 2023)."""

    kind: Literal["linear"]
    """All frequencies alike."""
    factor: float = Field(ge=1)
    """How many times longer the context becomes."""


class Llama3Scaling(_Table):
    """Slow frequencies are divided by factor, fast ones stay, those between are blended (Llama 3.1, Dubey et al. 2024)."""

    kind: Literal["llama3"]
    """By wavelength."""
    factor: float = Field(ge=1)
    """What slow frequencies are divided by."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """A frequency that turns fewer times than this within original_context is slow."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """A frequency that turns more often than this within original_context is fast."""
    original_context: int = Field(gt=0)
    """The context before it was extended."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> "Llama3Scaling":
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor: expected less than high_frequency_factor, {self.high_frequency_factor}, "
                f"got {self.low_frequency_factor}"
            )
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling, Field(discriminator="kind")]


class LlamaConfig(_Table):
    """LLaMA (Touvron et al. 2023) with grouped-query attention: every size that decides the weights."""

    # A preset, or other sizes, stand in for any of the required fields.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required"))

    name: Literal["llama"] = "llama"
    """The architecture."""
    preset: str | None = None
    """Sizes by name; fields written beside it win. "happy-llm-215m" is the largest."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Decoder layers."""
    heads: int = Field(gt=0)
    """Query heads."""
    kv_heads: int = Field(gt=0)
    """Key and value heads, each shared by heads / kv_heads query heads; default: heads."""
    head_size: int = Field(gt=0)
    """Width of a head; default: hidden_size / heads."""
    intermediate_size: int = Field(gt=0)
    """Width of the feed-forward layer; default: 8/3 hidden_size, rounded up to a multiple of 64."""
    context: int | None = Field(default=None, gt=0)
    """Longest sequence; default: the context of the tokens it is trained on."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding (Su et al. 2021)."""
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Expand the preset and the sizes that follow from others; the fields report wrong types."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
            values = PRESETS[preset] | {name: value for name, value in values.items() if name != "preset"}
        hidden, heads = values.get("hidden_size"), values.get("heads")
        filled = dict(values)
        if isinstance(heads, int):
            filled.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0:
            if "head_size" not in values and hidden % heads:
                raise ValueError(f"hidden_size: expected a multiple of heads, got hidden_size {hidden} and heads {heads}")
            filled.setdefault("head_size", hidden // heads)
        if isinstance(hidden, int):
            filled.setdefault("intermediate_size", -(-hidden * 8 // 3 // 64) * 64)
        # Where the fields that these follow from are missing, only those are reported.
        for name in ("kv_heads", "head_size", "intermediate_size"):
            filled.setdefault(name, 1)
        return filled

    @model_validator(mode="after")
    def _sizes_agree(self) -> "LlamaConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads, got heads {self.heads} and kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size: expected an even number, because rotary embeddings turn pairs, got {self.head_size}")
        return self

    @property
    def resolved_context(self) -> int:
        """Longest sequence; ValueError where it is still open."""
        if self.context is None:
            raise ValueError("context: expected the longest sequence of the model, got None; set it by `with_context`")
        return self.context

    def with_context(self, context: int) -> "LlamaConfig":
        """This configuration, with `context` where it leaves that open."""
        return self.model_copy(update={"context": context}) if self.context is None else self


def parameter_count(config: LlamaConfig, *, vocab_size: int) -> int:
    """How many weights a model has: embedding, layers, norms, and a head of its own where it is not tied."""
    embedding = vocab_size * config.hidden_size
    norms = (2 * config.layers + 1) * config.hidden_size
    return embedding * (1 if config.tied else 2) + norms + _layer_matrices(config) * config.layers


def flops_per_token(config: LlamaConfig, *, vocab_size: int, context: int) -> float:
    """Floating-point operations of a forward and backward pass per position of full rows: an estimate.

    6 per weight of a matrix product (the head counts, the embedding does not) and, for scores and mixing, 12 per layer,
    channel and visible position, of which there are context / 2 on average.
    """
    products = _layer_matrices(config) * config.layers + vocab_size * config.hidden_size
    return 6.0 * products + attention_flops(config, context=context)


def attention_flops(config: LlamaConfig, *, context: int) -> float:
    """The part of `flops_per_token` for attention scores and mixing."""
    return 12.0 * config.layers * config.heads * config.head_size * context / 2


def _layer_matrices(config: LlamaConfig) -> int:
    attention = 2 * config.hidden_size * config.head_size * (config.heads + config.kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


# Fields of a config.json with one supported value.
FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# Fields that must not be set: each would change the model.
UNSET = ("quantization_config", "sliding_window", "auto_map")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
ROPE_TYPES = ("default", "linear", "llama3")


def to_transformers(config: LlamaConfig) -> dict[str, Any]:
    """The fields of Transformers' LlamaConfig for the same model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    match config.rope_scaling:
        case LinearScaling(factor=factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return FIXED | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_transformers(found: Mapping[str, Any], *, dropout: float) -> LlamaConfig:
    """The configuration in the fields of Transformers' LlamaConfig, also of old versions, with Transformers' defaults.

    InputError names a field that is missing or not supported.
    """
    for field, expected in FIXED.items():
        if found.get(field, expected) != expected:
            raise _unsupported(field, repr(expected), found[field])
    for field in UNSET:
        if found.get(field) is not None:
            raise _unsupported(field, "nothing", found[field])
    for field in SIZES:
        if not isinstance(size := found.get(field), int) or size < 1:
            raise InputError(f"{field}: expected a whole number above 0, got {size!r}")
    heads = found["num_attention_heads"]
    context = found.get("max_position_embeddings", 2048)
    try:
        rope_base, rope_scaling = _rope(found, context=context)
        return LlamaConfig(
            hidden_size=found["hidden_size"],
            layers=found["num_hidden_layers"],
            heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_size=found.get("head_dim") or found["hidden_size"] // heads,
            intermediate_size=found["intermediate_size"],
            context=context,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            norm_eps=found.get("rms_norm_eps", 1e-6),
            dropout=dropout,
            tied=found.get("tie_word_embeddings", False),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].replace("Input should be", "expected")
        raise InputError(f"{place}: {message}, got {first['input']!r}" if place else message) from error


def _rope(found: Mapping[str, Any], *, context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Transformers before 5 wrote `rope_theta` and `rope_scaling`; 5 writes `rope_parameters` with both."""
    name = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = found.get(name) or {}
    base = rope.get("rope_theta") or found.get("rope_theta") or 10000.0
    key = "rope_type" if "rope_type" in rope else "type"  # "type" is the older name
    kind = rope.get(key, "default")
    if kind not in ROPE_TYPES:
        raise _unsupported(f"{name}.{key}", " or ".join(map(repr, ROPE_TYPES)), kind)
    partial = rope.get("partial_rotary_factor", found.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise _unsupported("partial_rotary_factor", "1", partial)
    if kind == "default":
        return base, None
    numbers = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    for field in numbers:
        if not isinstance(rope.get(field), int | float):
            raise InputError(f"{name}.{field}: expected a number for the {key} {kind!r}, got {rope.get(field)!r}")
    if kind == "linear":
        return base, LinearScaling(kind="linear", factor=rope["factor"])
    scaling = Llama3Scaling(
        kind="llama3",
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_context=found.get(original := "original_max_position_embeddings") or rope.get(original) or context,
    )
    return base, scaling


def _unsupported(field: str, expected: str, found: object) -> InputError:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InputError(f"{field}: expected {expected}, got {shown}: this architecture is not supported")


Config = LlamaConfig
MODEL_TYPE = "llama"
