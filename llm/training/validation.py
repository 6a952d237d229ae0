"""The loss on held-out rows; nothing is learned from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llm.data.batch import IGNORE, Batch, RowSource
from llm.device import is_out_of_memory, widened, widest
from llm.models.interface import LanguageModel
from llm.training.distributed.fsdp import is_sharded, reshard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches, most_batches
from llm.training.loss import Learner, next_token_loss
from llm.training.preflight.dry_run import smaller
from llm.training.runtime import Runtime

LOSS, BITS_PER_BYTE = "validation_loss", "validation_bits_per_byte"


@dataclass(frozen=True)
class Validation:
    """Held-out rows in a fixed order, and when and how they are looked at."""

    rows: RowSource  # neighbours are alike, so an even sample has all kinds
    sources: Sequence[str] = ()  # names of the sources that rows number; of two or more, each is reported
    tokens: int = 262_144  # positions to compute, at most
    every: int | None = None  # steps; besides, they are looked at after the last step
    watched: Sequence[str] = ()  # names of what the objective adds up besides the loss; the mean over its count is reported


@torch.no_grad()
def validation_losses(
    learner: nn.Module, validation: Validation, *, group: ProcessGroup, micro_batch: int, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean loss per target, shared by the processes; Interrupted once `should_stop` is true in one of them.

    None, in every process, where memory ran out in one while no other waited for it; otherwise that error is raised.
    """
    source = validation.rows
    chosen = even_sample(source.rows_per_epoch, validation.tokens // source.context)
    mine = batches(source, chosen[group.rank :: group.size], micro_batch)
    learner.eval()
    together = is_sharded(learner)
    sums = _Sums(validation, group.device)
    full = False
    for _ in range(most_batches(len(chosen), group, micro_batch)):
        if group.any_full(full, stopping=should_stop()):
            return None
        batch = next(mine, None)
        if batch is None:  # another process has one row more
            if together:
                learner(next(batches(source, range(1), 1)).to(group.device))  # that one needs all to gather weights
            continue
        batch = batch.to(group.device)
        try:
            sums.add(batch, *learner(batch))
        except (RuntimeError, MemoryError) as error:
            if together or not is_out_of_memory(error):
                raise
            full = True
    reshard(learner)
    if group.any_full(full, stopping=False):
        return None
    return sums.over_all(group)


def even_sample(rows: int, count: int) -> list[int]:
    """`count` of the numbers below `rows`, one drawn from each of as many equal parts, always the same; all if there are
    fewer.

    Evenly spaced ones would miss what repeats at the same distance.
    """
    count = max(1, min(rows, count))
    borders = np.arange(count + 1) * rows // count
    found: list[int] = np.random.default_rng(0).integers(borders[:-1], np.maximum(borders[1:], 1)).tolist()
    return found


class _Sums:
    """What has been added up over rows: of each source if the rows tell it, else as if there were one."""

    def __init__(self, validation: Validation, device: torch.device) -> None:
        self._watched, self._names = validation.watched, validation.sources
        shape = (max(1, len(self._names)), 3)
        self._sums = torch.zeros(shape, dtype=widest(device), device=device)  # (sources, 3) nats, targets, bytes of text
        self._others = torch.zeros(len(self._watched), dtype=widest(device), device=device)

    def add(self, batch: Batch, loss: Tensor, number: Tensor, *others: Tensor) -> None:
        """Take a batch into account, with what the objective returned for it."""
        if self._names and batch.sources is not None and others and not self._watched:
            counted = (others[0], batch.targets != IGNORE, batch.text_bytes)
            for column, values in enumerate(counted):
                if values is not None:
                    self._sums[:, column].index_add_(0, batch.sources.flatten().long(), widened(values.flatten()))
        else:
            self._sums[0, 0] += loss
            self._sums[0, 1] += number
            if batch.text_bytes is not None:
                self._sums[0, 2] += widened(batch.text_bytes).sum()
        for column in range(len(self._watched)):
            self._others[column] += others[column]

    def over_all(self, group: ProcessGroup) -> dict[str, float]:
        """The means, over the rows of all processes."""
        flat = group.sum(*self._sums.flatten().tolist(), *self._others.tolist())
        table = np.array(flat[: self._sums.numel()]).reshape(-1, 3)
        nats, targets, text_bytes = table.sum(0).tolist()
        found = {LOSS: nats / max(1.0, targets)}
        for name, one in zip(self._watched, flat[self._sums.numel() :], strict=True):
            found[f"validation_{name}"] = one / max(1.0, targets)
        if not self._watched:
            found["validation_perplexity"] = math.exp(min(found[LOSS], 700.0))  # beyond is infinity, which JSON lacks
        if text_bytes:
            found[BITS_PER_BYTE] = nats / math.log(2) / text_bytes
        if len(self._names) > 1 and not self._watched:
            for name, (nats, targets, text_bytes) in zip(self._names, table.tolist(), strict=True):
                if targets:
                    found[f"{LOSS}/{name}"] = nats / targets
                if targets and text_bytes:
                    found[f"{BITS_PER_BYTE}/{name}"] = nats / math.log(2) / text_bytes
        return found


def validate_model(
    model: LanguageModel, validation: Validation, *, runtime: Runtime, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """`validation_losses` of a model that is not being trained, computed as a training with `runtime` does."""
    group = ProcessGroup()
    model.fused_attention = runtime.fused_attention
    learner = Learner(model.to(group.device), next_token_loss, precision=runtime.precision)
    micro_batch = runtime.micro_batch
    while True:
        found = validation_losses(learner, validation, group=group, micro_batch=micro_batch, should_stop=should_stop)
        if found is not None:
            return found
        micro_batch = smaller(micro_batch, auto=True, context=validation.rows.context)
