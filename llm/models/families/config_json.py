"""Reads and writes the parts of Transformers' config.json that families share: rotary positions, and how a field is refused.

Transformers before 5 wrote `rope_theta` and `rope_scaling`; 5 writes `rope_parameters` with both.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm.errors import InputError
from llm.models.options import DynamicScaling, LinearScaling, Llama3Scaling, LongRope, RopeScaling, YarnScaling

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MOST = 1 << 20  # of any of them, before a list is made of them
ORIGINAL = "original_max_position_embeddings"
# The numbers that a scaling cannot do without.
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": (),
}


def refused(field: str, expected: str, found: object) -> InputError:
    """The error for a field with a value that is not supported."""
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InputError(f"{field}: expected {expected}, got {shown}: this architecture is not supported")


def read_rope(
    found: Mapping[str, Any], *, kinds: Sequence[str], context: int, base: float, partial: bool = False
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding in the fields of a config.json."""
    name = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = found.get(name) or {}
    if not isinstance(rope, Mapping):
        raise refused(name, "a table", rope)
    base = rope.get("rope_theta") or found.get("rope_theta") or base
    key = "rope_type" if "rope_type" in rope else "type"  # "type" is the older name
    kind = rope.get(key, "default")
    if kind not in ("default", *kinds):
        raise refused(f"{name}.{key}", " or ".join(map(repr, ("default", *kinds))), kind)
    share = rope.get("partial_rotary_factor", found.get("partial_rotary_factor"))
    if share not in (None, 1) and not partial:
        raise refused("partial_rotary_factor", "1", share)
    if kind == "default":
        return base, None
    for field in NEEDED[kind]:
        if not isinstance(rope.get(field), int | float):
            raise InputError(f"{name}.{field}: expected a number for the {key} {kind!r}, got {rope.get(field)!r}")
    return base, _scaling(kind, rope, original=found.get(ORIGINAL) or rope.get(ORIGINAL) or context)


def _scaling(kind: str, rope: Mapping[str, Any], *, original: int) -> RopeScaling:
    match kind:
        case "linear":
            return LinearScaling(kind="linear", factor=rope["factor"])
        case "dynamic":
            return DynamicScaling(kind="dynamic", factor=rope["factor"])
        case "llama3":
            return Llama3Scaling(
                kind="llama3",
                factor=rope["factor"],
                low_frequency_factor=rope["low_freq_factor"],
                high_frequency_factor=rope["high_freq_factor"],
                original_context=original,
            )
        case "yarn":
            return YarnScaling(
                kind="yarn",
                factor=rope["factor"],
                original_context=original,
                attention_factor=rope.get("attention_factor") or _ratio_of_scales(rope),
                fast=rope.get("beta_fast") or 32.0,
                slow=rope.get("beta_slow") or 1.0,
                truncate=rope.get("truncate", True),
            )
    return LongRope(
        kind="longrope",
        short_divisors=rope.get("short_factor"),  # type: ignore[arg-type]  # pydantic says what is wrong with it
        long_divisors=rope.get("long_factor"),  # type: ignore[arg-type]
        original_context=original,
        factor=rope.get("factor"),
        attention_factor=rope.get("attention_factor"),
    )


def _ratio_of_scales(rope: Mapping[str, Any]) -> float | None:
    """The attention factor that DeepSeek's two fields of yarn stand for; None without them."""
    scale, over_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not scale or not over_all:
        return None
    growth = 0.1 * math.log(rope["factor"])
    return float((growth * scale + 1) / (growth * over_all + 1))


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Transformers' `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    match scaling:
        case LinearScaling(factor=factor) | DynamicScaling(factor=factor):
            rope |= {"rope_type": scaling.kind, "factor": factor}
        case Llama3Scaling():
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                ORIGINAL: scaling.original_context,
            }
        case YarnScaling():
            rope |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                ORIGINAL: scaling.original_context,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                "truncate": scaling.truncate,
            }
        case LongRope():
            rope |= {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_divisors),
                "long_factor": list(scaling.long_divisors),
                ORIGINAL: scaling.original_context,
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
            }
    return {name: value for name, value in rope.items() if value is not None}
