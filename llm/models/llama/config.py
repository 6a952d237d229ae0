"""The shape of a LLaMA decoder, as a recipe writes it. No torch here: recipes are checked without loading it.

A `preset` is only shorthand: its values are filled in and the field itself ends as None, so that a preset and the same sizes
written out are one and the same configuration.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
            if preset not in PRESETS:
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


Config = LlamaConfig
