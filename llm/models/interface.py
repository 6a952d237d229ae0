"""What everything outside of `llm.models` may ask of an architecture."""

import math

from torch import Tensor, nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    learned = sum(numbers_in(weight) for weight in model.parameters() if weight.requires_grad)
    return learned, sum(numbers_in(weight) for weight in model.parameters())


def numbers_in(weight: Tensor) -> int:
    """The numbers that `weight` stands for."""
    packed = getattr(weight, "quant_state", None)  # what bitsandbytes keeps of a weight in four bits
    return weight.numel() if packed is None else math.prod(packed.shape)
