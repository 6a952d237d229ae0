"""The shape of a LLaMA decoder, as a recipe and as Transformers write it. No torch here: recipes are checked without it.

A `preset` is only shorthand: its values are filled in and the field itself ends as None, so that a preset and the same sizes
written out are one and the same configuration.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    "2m": {"hidden_size": 192, "layers": 4, "heads": 6},
    "10m": {"hidden_size": 320, "layers": 6, "heads": 5},
    "25m": {"hidden_size": 512, "layers": 8, "heads": 8},
    "85m": {"hidden_size": 768, "layers": 12, "heads": 12},
    # The shape of Happy-LLM's pretrained model (215M with its vocabulary of 6144), chapter 5 of its book.
    "happy-llm-215m": {"hidden_size": 1024, "layers": 18, "heads": 16, "kv_heads": 8},
}


class LlamaConfig(BaseModel):
    """LLaMA (Touvron et al. 2023) with grouped-query attention: every size that decides the weights."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=lambda schema: schema.pop("required"),  # a preset, or other sizes, stand in for any of them
    )

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
        """Expand the preset and the sizes that follow from others; wrong types are left for the fields to report."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"preset wants one of {', '.join(PRESETS)}; found {preset!r}")
            values = PRESETS[preset] | {name: value for name, value in values.items() if name != "preset"}
        hidden, heads = values.get("hidden_size"), values.get("heads")
        filled = dict(values)
        if isinstance(heads, int):
            filled.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0:
            if "head_size" not in values and hidden % heads:
                raise ValueError(f"hidden_size wants a multiple of heads; found hidden_size {hidden} and heads {heads}")
            filled.setdefault("head_size", hidden // heads)
        if isinstance(hidden, int):
            filled.setdefault("intermediate_size", -(-hidden * 8 // 3 // 64) * 64)
        # A field that others decide is not "missing" when those are: the message is then about them alone.
        for name in ("kv_heads", "head_size", "intermediate_size"):
            filled.setdefault(name, 1)
        return filled

    @model_validator(mode="after")
    def _sizes_agree(self) -> "LlamaConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads wants a divisor of heads; found heads {self.heads} and kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size wants an even number, because rotary embeddings turn pairs; found {self.head_size}")
        return self


# What the model computes however it is configured; another value in a config.json means another model.
FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def to_transformers(config: LlamaConfig) -> dict[str, Any]:
    """The fields of Transformers' LlamaConfig."""
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_transformers(found: Mapping[str, Any], *, dropout: float) -> LlamaConfig:
    """What the fields of Transformers' LlamaConfig say; InputError names one that the model cannot honour."""
    for field, wanted in FIXED.items():
        if found.get(field, wanted) != wanted:
            raise InputError(f"{field} wants {wanted!r}, found {found[field]!r}: this architecture is not supported")
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"rope_type wants 'default', found {rope_type!r}: this scaling is not supported")
    heads = found["num_attention_heads"]
    return LlamaConfig(
        hidden_size=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_size=found.get("head_dim") or found["hidden_size"] // heads,
        intermediate_size=found["intermediate_size"],
        context=found["max_position_embeddings"],
        rope_base=rope.get("rope_theta") or found.get("rope_theta") or 10000.0,
        norm_eps=found.get("rms_norm_eps", 1e-6),
        dropout=dropout,
        tied=found.get("tie_word_embeddings", False),
    )


Config = LlamaConfig
MODEL_TYPE = "llama"
