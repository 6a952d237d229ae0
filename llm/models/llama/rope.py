"""The frequencies of the rotary position embedding, stretched where a model was extended to a longer context.

Letters: E head size.
"""

import math

import torch
from torch import Tensor

from llm.models.llama.config import LinearScaling, Llama3Scaling, LlamaConfig


def frequencies(config: LlamaConfig, *, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels, (E / 2,): base^(-2i / E) (Su et al. 2021), then `config.rope_scaling`."""
    exponent = torch.arange(0, config.head_size, 2, device=device, dtype=torch.int64).float() / config.head_size
    plain = 1.0 / config.rope_base**exponent
    match config.rope_scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            # How often it turns within the original context decides; https://arxiv.org/abs/2407.21783 and the released code.
            turns = scaling.original_context / (2 * math.pi / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 slow, 1 fast
            return (1 - kept) * plain / scaling.factor + kept * plain
    return plain
