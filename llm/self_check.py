"""Seconds before hours: whether a fresh model has the right output shape, starts near chance, and can learn one row by heart.

It works on a copy and draws no random numbers, so the training that follows is the same with and without it.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from llm.errors import InputError
from llm.objectives import Objective
from llm.rows import Row, collate

LENGTH = 128  # tokens of the row that is used
NEAR = 1.0  # nats between the first loss and ln(vocabulary)
OVERFITS_BELOW = 5.0  # nats per target
TRIES = 60  # steps to get there


def self_check(model: nn.Module, objective: Objective, row: Row) -> dict[str, float]:
    """What was found, or InputError with what is wrong. The caller's autocast applies."""
    learner: Any = copy.deepcopy(model).eval()  # without dropout
    device = next(learner.parameters()).device
    batch = collate([Row(row.tokens[:LENGTH], row.targets[:LENGTH], row.documents[:LENGTH])], [0]).to(device)
    with torch.no_grad():
        shape = tuple(learner(batch.tokens, documents=batch.documents, positions=batch.positions).shape)
    wanted = (1, batch.tokens.shape[1], learner.vocab_size)
    if shape != wanted:
        raise InputError(f"self-check: logits want the shape {wanted}, found {shape}")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3, weight_decay=0.0)
    chance = math.log(learner.vocab_size)
    first = loss = math.inf
    for step in range(TRIES + 1):
        total, count = objective(learner, batch)
        mean = total / count
        loss = mean.item()
        if step == 0:
            first = loss
            if not abs(first - chance) <= NEAR:
                raise InputError(
                    f"self-check: the first loss wants to be near ln(vocabulary) = {chance:.2f}, found {first:.2f}: "
                    "the initialization does not suit this architecture"
                )
        if loss < OVERFITS_BELOW:
            return {"chance": chance, "first_loss": first, "overfit_loss": loss, "overfit_steps": step}
        mean.backward()  # type: ignore[no-untyped-call]  # torch leaves `backward` untyped
        optimizer.step()
        optimizer.zero_grad()
    raise InputError(
        f"self-check: one row wants to be learned to a loss below {OVERFITS_BELOW} in {TRIES} steps, found {loss:.2f}"
    )
