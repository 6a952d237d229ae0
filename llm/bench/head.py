"""The head of a large vocabulary: value and gradients of the loss, in our chunks and by autograd of all logits at once.

Seconds per token and vocabulary entry should not depend on the vocabulary: where chunks are too small, they grow with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llm.bench.timing import interleaved, ratio
from llm.device import autocast, resolve_precision
from llm.training.loss import chunk_rows, cross_entropy_sum

VOCABULARIES = (8192, 32768)
POSITIONS = 1024


def measure_head(
    hidden_size: int, *, seconds: float, device: torch.device, vocabularies: Sequence[int] = VOCABULARIES
) -> dict[str, Any]:
    """For each vocabulary the seconds of both, and of ours per GFLOP of the three products."""
    precision = resolve_precision("auto", device=device)
    found: dict[str, Any] = {}
    for vocabulary in vocabularies:
        torch.manual_seed(0)
        head = nn.Linear(hidden_size, vocabulary, bias=False, device=device)
        hidden = torch.randn(POSITIONS, hidden_size, device=device, requires_grad=True)
        targets = torch.randint(vocabulary, (POSITIONS,), device=device)

        def learn(in_chunks: bool, head: nn.Linear = head, hidden: Tensor = hidden, targets: Tensor = targets) -> None:
            with autocast(precision, device=device):
                if in_chunks:
                    total = cross_entropy_sum(head, hidden, targets)
                else:
                    total = cross_entropy(head(hidden).float(), targets, reduction="sum")
            torch.autograd.grad(total, (hidden, head.weight))

        calls = {"ours": lambda learn=learn: learn(True), "at_once": lambda learn=learn: learn(False)}
        timings = interleaved(calls, seconds=seconds / len(vocabularies), device=device)
        taken = min(timings["ours"].rounds)
        found[str(vocabulary)] = {
            "seconds": taken,
            "seconds_at_once": min(timings["at_once"].rounds),
            "time_of_at_once": ratio(timings, "ours", "at_once"),
            "seconds_per_gflop": taken / (6e-9 * POSITIONS * hidden_size * vocabulary),
            "chunk_rows": min(POSITIONS, chunk_rows(vocabulary)),
        }
    return {"positions": POSITIONS, "hidden_size": hidden_size, "precision": precision, "vocabularies": found}
