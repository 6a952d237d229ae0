"""Log-probabilities of chosen tokens, without logits of the whole vocabulary for more than a part of the positions.

Letters: N positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.device import widened, widest

LOGITS = 2**25  # numbers in one piece of logits: 128 MiB in fp32, and 128 positions of the largest vocabulary in use


def log_probabilities(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocab_size: int) -> Tensor:
    """log P of each of targets (N,) after hidden (N, D), in the widest dtype; `head` makes logits (n, V) of hidden states (n,
    D)."""
    rows = max(1, LOGITS // vocab_size)
    found = torch.empty(len(targets), dtype=widest(hidden.device), device=hidden.device)
    for start in range(0, len(targets), rows):
        logits = head(hidden[start : start + rows]).float()
        chosen = logits.gather(-1, targets[start : start + rows, None])[:, 0]
        found[start : start + rows] = widened(chosen) - logits.logsumexp(-1)
    return found
