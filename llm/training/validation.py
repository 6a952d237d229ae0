"""The loss on held-out rows; nothing is learned from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llm.data.batch import RowSource
from llm.models.interface import LanguageModel
from llm.training.distributed.fsdp import is_sharded, reshard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches, most_batches
from llm.training.loss import Learner, next_token_loss
from llm.training.runtime import Runtime


@dataclass(frozen=True)
class Validation:
    """Held-out rows in a fixed order, and when and how they are looked at."""

    rows: RowSource
    bytes_per_token: float | None = None  # of the whole text; None where bits per byte have no meaning
    tokens: int = 262_144  # positions to compute, at most
    every: int | None = None  # steps; besides, they are looked at after the last step
    watched: Sequence[str] = ()  # names of what the objective adds up besides the loss; the mean over its count is reported


@torch.no_grad()
def validation_losses(
    learner: nn.Module, validation: Validation, *, group: ProcessGroup, micro_batch: int, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """Mean loss per target, shared by the processes; Interrupted once `should_stop` is true in one of them."""
    source = validation.rows
    count = max(1, min(source.rows_per_epoch, validation.tokens // source.context))
    mine = batches(source, range(group.rank, count, group.size), micro_batch)
    learner.eval()
    together = is_sharded(learner)
    total = targets = positions = torch.zeros((), dtype=torch.float64, device=group.device)
    sums = [total] * len(validation.watched)
    for _ in range(most_batches(count, group, micro_batch)):
        group.stop_if(should_stop())
        batch = next(mine, None)
        if batch is None:  # another process has one row more
            if together:
                learner(next(batches(source, range(1), 1)).to(group.device))  # that one needs all to gather weights
            continue
        batch = batch.to(group.device)
        loss, number, *others = learner(batch)
        total, targets, positions = total + loss, targets + number, positions + (batch.documents >= 0).sum()
        sums = [before + other for before, other in zip(sums, others, strict=True)]
    reshard(learner)
    nats, number, tokens, *seen = group.sum(total.item(), targets.item(), positions.item(), *(one.item() for one in sums))
    loss_per_target = nats / max(1.0, number)
    found = {"validation_loss": loss_per_target}
    if validation.watched:
        found |= {f"validation_{name}": one / max(1.0, number) for name, one in zip(validation.watched, seen, strict=True)}
    else:
        found["validation_perplexity"] = math.exp(min(loss_per_target, 700.0))  # beyond is infinity, which JSON lacks
    if validation.bytes_per_token is not None:
        found["validation_bits_per_byte"] = nats / math.log(2) / max(1.0, tokens * validation.bytes_per_token)
    return found


def validate_model(
    model: LanguageModel, validation: Validation, *, runtime: Runtime, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """`validation_losses` of a model that is not being trained, computed as a training with `runtime` does."""
    group = ProcessGroup()
    model.fused_attention = runtime.fused_attention
    learner = Learner(model.to(group.device), next_token_loss, precision=runtime.precision)
    return validation_losses(learner, validation, group=group, micro_batch=runtime.micro_batch, should_stop=should_stop)
