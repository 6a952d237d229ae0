"""What may differ between decoders that are otherwise alike: options of the mathematics, as tables of a recipe. No torch here.

`llm.models.families` says which options each family has, `llm.models.decoder` computes them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Table(BaseModel):
    """A table of a recipe: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class LinearScaling(Table):
    """Positions count 1 / factor: a longer context in the range of angles that was trained (Chen et al. 2023)."""

    kind: Literal["linear"]
    """All frequencies alike."""
    factor: float = Field(ge=1)
    """How many times longer the context becomes."""


class Llama3Scaling(Table):
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


class YarnScaling(Table):
    """As llama3's, but blended by the number of the pair of channels, and with larger scores (YaRN, Peng et al. 2023)."""

    kind: Literal["yarn"]
    """By the number of turns."""
    factor: float = Field(ge=1)
    """What slow frequencies are divided by."""
    original_context: int = Field(gt=0)
    """The context before it was extended."""
    attention_factor: float | None = Field(default=None, gt=0)
    """What rotated queries and keys are multiplied by; default: 1 + 0.1 ln(factor)."""
    fast: float = Field(default=32.0, gt=0)
    """A frequency that turns more often than this within original_context stays."""
    slow: float = Field(default=1.0, gt=0)
    """A frequency that turns fewer times than this within original_context is divided."""
    truncate: bool = True
    """Whether the bounds between them are rounded outwards to whole pairs of channels."""


class DynamicScaling(Table):
    """The base grows with the length of a text, once that is above the context: up to there, as without scaling."""

    kind: Literal["dynamic"]
    """By the length of the text."""
    factor: float = Field(ge=1)
    """How fast it grows."""


class LongRope(Table):
    """Each frequency has a divisor of its own, and another one in texts above the original context (Ding et al. 2024)."""

    kind: Literal["longrope"]
    """By measured divisors."""
    short_divisors: Annotated[tuple[float, ...], Field(strict=False)]
    """Of the frequencies in texts of up to original_context."""
    long_divisors: Annotated[tuple[float, ...], Field(strict=False)]
    """Of the frequencies in longer texts."""
    original_context: int = Field(gt=1)
    """The context before it was extended."""
    factor: float | None = Field(default=None, gt=0)
    """How many times longer the context became; default: context / original_context."""
    attention_factor: float | None = Field(default=None, gt=0)
    """What rotated queries and keys are multiplied by; default: sqrt(1 + ln(factor) / ln(original_context))."""


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRope, Field(discriminator="kind")]
Kind = Literal["full", "window", "unrotated"]


class Options(Table):
    """How a decoder differs from the first LLaMA; by default as its family does. The others of a family are written too."""

    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which projections of attention add a bias: queries, keys and values, or the output too."""
    mlp_bias: bool = False
    """Whether the projections of the feed-forward layer add a bias."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """RMSNorm of queries and keys before the rotation, of each head or of all heads together."""
    norms: Literal["before", "after", "around"] = "before"
    """Where a branch is normalized: what it reads, what it adds, or both."""
    norm_weight: Literal["w", "1 + w"] = "w"
    """What a norm multiplies by; 1 + w starts from w = 0 (Gemma)."""
    gate: Literal["silu", "gelu"] = "silu"
    """The function of the feed-forward layer's gate; "gelu" in its form by tanh."""
    fused: Literal["none", "gate_up", "all"] = "none"
    """Whether gate and up are one matrix (GLM), and queries, keys and values another (Phi-3): the same mathematics."""
    pattern: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1)] = ("full",)
    """Kinds of layers, repeated: they see everything before, or a window of it, or everything without rotary positions."""
    window: int | None = Field(default=None, gt=0)
    """Positions that a "window" layer sees, its own among them."""
    window_rope_base: float | None = Field(default=None, gt=0)
    """Base of the rotary embedding in "window" layers, which is then not scaled; default: as in the others."""
    rotary_share: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that is rotated: its first channels."""
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    """Which channels are rotated together: i and i + half of those that are, or 2i and 2i + 1 (GLM)."""
    query_growth: float = Field(default=0.0, ge=0)
    """b, by which queries at position p grow: times 1 + b ln(1 + floor(p / original context of the scaling)) (Ministral 3)."""
    embedding_scale: float | Literal["sqrt"] = 1.0
    """What embeddings are multiplied by; "sqrt": by sqrt(hidden_size)."""
    residual_scale: float = Field(default=1.0, gt=0)
    """What a branch is multiplied by before it is added."""
    attention_scale: float | None = Field(default=None, gt=0)
    """What scores of attention are multiplied by; default: 1 / sqrt(head_size)."""
    logit_divisor: float = Field(default=1.0, gt=0)
    """What logits are divided by."""
    attention_softcap: float = Field(default=0.0, ge=0)
    """c, by which a score s of attention becomes c tanh(s / c); 0: as it is."""
    final_softcap: float = Field(default=0.0, ge=0)
    """The same of logits."""

    @model_validator(mode="after")
    def _window_is_there(self) -> "Options":
        if "window" in self.pattern and self.window is None:
            raise ValueError('window: expected a number of positions, since pattern has "window", got none')
        return self


def shortest(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The shortest pattern that gives `kinds` when it is repeated."""
    sizes = range(1, len(kinds) + 1)
    return next(kinds[:size] for size in sizes if all(kind == kinds[i % size] for i, kind in enumerate(kinds)))
