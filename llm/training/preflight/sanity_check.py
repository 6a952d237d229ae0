"""Whether a fresh model has the right output shape, starts near chance, and can overfit one batch: seconds before hours.

It works on a copy and draws no random numbers, so the training that follows is the same with and without it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm.data.batch import Batch
from llm.device import Precision
from llm.errors import InputError
from llm.models.interface import LanguageModel
from llm.training.loss import Learner, Objective

ROWS, LENGTH = 8, 128  # of the batch, at most: a large model takes seconds, too
NEAR = 1.0  # nats between the first loss and ln(vocabulary)
OVERFITS_BELOW = 5.0  # nats per target
TRIES = 60  # steps to get there


def sanity_check(
    model: LanguageModel,
    objective: Objective,
    batch: Batch,
    *,
    precision: Precision,
    placed: Callable[[Learner], Learner] = lambda learner: learner,  # on its device, and sharded as in training
    agreed: Callable[[float], float] = lambda value: value,  # of all processes that compute together
) -> dict[str, float]:
    """What was found on the first rows and positions of `batch`; InputError says what is wrong."""
    learner = placed(Learner(copy.deepcopy(model), objective, precision=precision)).eval()  # without dropout
    copied = learner.model
    device = next(copied.parameters()).device
    corner = {name: getattr(batch, name)[:ROWS, :LENGTH] for name in ("tokens", "targets", "documents", "positions")}
    batch = replace(batch, rows=batch.rows[:ROWS], **corner).to(device)
    learner.objective = _logits
    with torch.no_grad():
        shape = tuple(learner(batch)[0].shape)
    learner.objective = objective
    wanted = (*batch.tokens.shape, copied.vocab_size)
    if shape != wanted:
        raise InputError(f"self-check: logits: expected the shape {wanted}, got {shape}")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3, weight_decay=0.0)
    chance = math.log(copied.vocab_size)
    first = loss = math.inf
    for step in range(TRIES + 1):
        total, count = learner(batch)
        mean = total / count
        loss = agreed(mean.item())
        if step == 0:
            first = loss
            if not abs(first - chance) <= NEAR:
                raise InputError(
                    f"self-check: the first loss: expected to be near ln(vocabulary) = {chance:.2f}, got {first:.2f}: "
                    "the initialization does not suit this architecture"
                )
        if loss < OVERFITS_BELOW:
            return {"chance": chance, "first_loss": first, "overfit_loss": loss, "overfit_steps": step}
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise InputError(
        f"self-check: the loss on one batch: expected less than {OVERFITS_BELOW} after {TRIES} steps on it, got {loss:.2f}"
    )


def _logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch.tokens, documents=batch.documents, positions=batch.positions), batch.rows
