"""Rotary position embedding (Su et al. 2021): the angles of each kind of layer, and how they are stretched for long texts.

Letters: B rows, T positions, R rotated channels of a head.
"""

import math

import torch
from torch import Tensor

from llm.models.decoder.config import DecoderConfig
from llm.models.options import Kind, LinearScaling, Llama3Scaling, LongRope, YarnScaling

Waves = tuple[Tensor, Tensor]  # cosine and sine, (1 or B, 1, T, R / 2)
Angles = tuple[Waves, Waves]  # what queries are rotated by, and what keys are


def rope_angles(
    config: DecoderConfig, positions: Tensor, *, kind: Kind = "full", lengths: Tensor | int | None = None
) -> Angles | None:
    """Cosine and sine of position * frequency for positions (1 or B, T), times what the scaling multiplies them by, and those
    for queries also times their growth; None in a layer without rotary positions.

    `lengths` of the texts that positions belong to, (1 or B, T) or one for all, decides frequencies that depend on it; without
    it they are taken from the positions, which count from 0 in each text.
    """
    if kind == "unrotated":
        return None
    by_length = isinstance(config.rope_scaling, LongRope) and not (kind == "window" and config.parts.window_rope_base)
    angle = _angle(positions, rope_frequencies(config, kind=kind, device=positions.device))
    if by_length:
        assert isinstance(config.rope_scaling, LongRope)
        lengths = text_lengths(positions) if lengths is None else torch.as_tensor(lengths, device=positions.device)
        is_long = lengths.expand(positions.shape)[:, None, :, None] > config.rope_scaling.original_context
        if bool(is_long.any()):
            frequencies = rope_frequencies(config, kind=kind, device=positions.device, is_long=True)
            angle = torch.where(is_long, _angle(positions, frequencies), angle)
    factor = attention_factor(config) if kind == "full" or config.parts.window_rope_base is None else 1.0
    cosine, sine = angle.cos(), angle.sin()
    if factor != 1:
        cosine, sine = cosine * factor, sine * factor
    if not config.parts.query_growth:
        return (cosine, sine), (cosine, sine)
    growth = query_growth(config, positions)[:, None, :, None]
    return (cosine * growth, sine * growth), (cosine, sine)


def query_growth(config: DecoderConfig, positions: Tensor) -> Tensor:
    """What queries at `positions` are multiplied by, in fp32 (Scalable-Softmax, Nakanishi 2025, as in Llama 4)."""
    assert isinstance(config.rope_scaling, YarnScaling)  # the configuration is checked
    windows = (positions // config.rope_scaling.original_context).float()
    return 1 + config.parts.query_growth * windows.log1p()


def _angle(positions: Tensor, frequencies: Tensor) -> Tensor:
    return positions[:, None, :, None].float() * frequencies


def text_lengths(positions: Tensor) -> Tensor:
    """The length of the text that each of positions (B, T) belongs to; they count from 0 in each."""
    text = (positions == 0).cumsum(1)  # its number in the row, from 1
    longest = torch.zeros_like(torch.nn.functional.pad(positions, (0, 1)))
    return longest.scatter_reduce(1, text, positions + 1, "amax").gather(1, text)


def rope_frequencies(config: DecoderConfig, *, device: torch.device, kind: Kind = "full", is_long: bool = False) -> Tensor:
    """Radians per position of each pair of channels, (R / 2,): base^(-2i / R), then `config.rope_scaling`."""
    size = config.rotated_size
    exponent = torch.arange(0, size, 2, device=device, dtype=torch.int64).float() / size
    if kind == "window" and config.parts.window_rope_base is not None:
        return 1.0 / config.parts.window_rope_base**exponent
    powers = config.rope_base**exponent
    plain = 1.0 / powers
    match config.rope_scaling:  # "dynamic" changes nothing up to the context, and no text is longer
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            # By the number of turns within the original context; https://arxiv.org/abs/2407.21783 and the released code.
            turns = scaling.original_context / (2 * math.pi / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 slow, 1 fast
            return (1 - kept) * plain / scaling.factor + kept * plain
        case YarnScaling() as scaling:
            kept = 1 - _ramp(scaling, base=config.rope_base, size=size).to(device)
            return (1 - kept) / (scaling.factor * powers) + kept * plain
        case LongRope() as scaling:
            divisors = scaling.long_divisors if is_long else scaling.short_divisors
            return 1.0 / (torch.tensor(divisors, device=device) * powers)
    return plain


def _ramp(scaling: YarnScaling, *, base: float, size: int) -> Tensor:
    """0 for the pairs of channels that turn fast, 1 for slow ones, and between them a line in the number of the pair."""

    def pair(turns: float) -> float:
        """The pair of channels, as a real number, that turns so often within the original context."""
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    return ((torch.arange(size // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def attention_factor(config: DecoderConfig) -> float:
    """What rotated queries and keys are multiplied by."""
    match config.rope_scaling:
        case YarnScaling(attention_factor=None, factor=factor):
            return 0.1 * math.log(factor) + 1.0
        case LongRope(attention_factor=None) as scaling:
            factor = scaling.factor or config.resolved_context / scaling.original_context
            return math.sqrt(1 + math.log(factor) / math.log(scaling.original_context)) if factor > 1 else 1.0
        case YarnScaling(attention_factor=float(found)) | LongRope(attention_factor=float(found)):
            return found
    return 1.0
