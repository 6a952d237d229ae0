"""Objectives: functions of (model, batch) that return the loss summed over targets, the number of targets, and sums of
whatever else is reported of held-out rows. This is the one of language modelling; that of preferences is `llm.training.dpo`.

The sum, not the mean: a step divides by the number of targets of all its rows, wherever they were computed. Logits exist for a
part of the positions at a time, and only where there is a target.

Letters: N positions with a target, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from llm.adapters.frozen import FrozenLinear
from llm.data.batch import IGNORE, Batch
from llm.device import Precision, autocast, widest
from llm.layers.ops import compute_dtype
from llm.models.interface import LanguageModel

Objective = Callable[[Any, Batch], tuple[Tensor, ...]]

# Logits in memory at a time, in fp32: 24 MiB. With 6144 tokens, chunks of 1,024 positions take 0.93 of the time of chunks of
# 341, and no more than larger ones. But every chunk passes over the whole weight and its whole gradient, which a few rows do
# not pay for: with 131,072 tokens and 256 channels on 2 AVX2 cores, chunks of 512 take 0.64 of the time of chunks of 48.
CHUNK_ELEMENTS = 3 * 2**21
CHUNK_ROWS = 512  # at least, however large the vocabulary
WEIGHT_ROWS = 2**13  # of the weight's gradient computed at a time, since the whole product is as large as the weight


class Learner(nn.Module):
    """Model and objective as one module, which is what data parallelism wraps."""

    def __init__(self, model: LanguageModel, objective: Objective, *, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Sum of the loss over the batch's targets, their number, and what else the objective adds up."""
        with autocast(self.precision, device=batch.tokens.device):
            return self.objective(self.model, batch)


def next_token_loss(model: LanguageModel, batch: Batch) -> tuple[Tensor, ...]:
    """Cross-entropy of the next token, summed over the batch's targets, and their number (both 0-dimensional tensors), each by
    the weights of the targets if they have some.

    Where the batch says of which source each target is, the loss (B, T) of each position, too.
    """
    hidden = model.hidden(batch.tokens, documents=batch.documents, positions=batch.positions).flatten(0, 1)
    targets = batch.targets.flatten()
    learned = targets != IGNORE
    if batch.sources is not None:
        losses = hidden.new_zeros(targets.shape, dtype=torch.float32)
        losses[learned] = token_losses(model.lm_head, hidden[learned], targets[learned])
        return losses.sum(dtype=widest(losses.device)), learned.sum(), losses.view_as(batch.targets)
    weights = None if batch.weights is None else batch.weights.flatten()
    # Boolean indexing asks the device how many there are. On a GPU that would stall the queue, so there all are computed.
    if hidden.device.type == "cpu" and not bool(learned.all()):
        hidden, targets = hidden[learned], targets[learned]
        weights = None if weights is None else weights[learned]
    counted = learned.sum() if weights is None else weights.sum()
    return cross_entropy_sum(model.lm_head, hidden, targets, weights), counted


def cross_entropy_sum(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of -log softmax(head(hidden))[target] over hidden (N, D), targets (N,), by weights (N,); IGNORE counts nothing."""
    if type(head) in (nn.Linear, FrozenLinear) and head.bias is None and not head._forward_hooks:
        weight: Any = head.weight
        if not torch.is_grad_enabled():  # which `needs_input_grad` of a Function does not know
            hidden, weight = hidden.detach(), weight.detach()
        total: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype(hidden), weights)
        return total
    # A wrapped head (with an adapter, say) is called as a module; its logits are computed again in the backward pass.
    losses = token_losses(head, hidden, targets)
    return losses.sum() if weights is None else (losses * weights).sum()


def chunk_rows(vocabulary: int) -> int:
    """How many positions have their logits in memory at a time."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(head(hidden))[target] of each of hidden (N, D), targets (N,); 0 at IGNORE. Logits are not kept."""
    vocabulary: int = head.out_features  # type: ignore[assignment]  # PEFT's wrappers of nn.Linear have it too
    rows = chunk_rows(vocabulary)
    parts = [
        checkpoint(_chunk_losses, head, hidden[start : start + rows], targets[start : start + rows], use_reentrant=False)
        for start in range(0, len(hidden), rows)
    ]
    return torch.cat(parts) if parts else hidden.sum(1)


def _chunk_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE, reduction="none")


class LinearCrossEntropy(Function):
    """Head and cross-entropy in one, chunk by chunk: the forward pass computes gradients too, while a chunk's logits exist.

    The result is a sum, so the incoming gradient is one number, and the backward pass only scales by it.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, counts: Tensor | None
    ) -> Tensor:
        rows = chunk_rows(weight.shape[0])
        x, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(x) if any(ctx.needs_input_grad[:2]) else None
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(x), rows):
                chunk = slice(start, start + rows)
                counted = targets[chunk] != IGNORE if counts is None else counts[chunk] * (targets[chunk] != IGNORE)
                loss, dlogits = _chunk_loss(x[chunk], w, targets[chunk], counted[:, None], wanted=dhidden is not None)
                total += loss
                if dlogits is None or dhidden is None:
                    continue
                torch.mm(dlogits, w, out=dhidden[chunk])
                if dweight is not None:
                    for first in range(0, len(w), WEIGHT_ROWS):
                        part = slice(first, first + WEIGHT_ROWS)
                        dweight[part] += dlogits[:, part].t() @ x[chunk]
                del dlogits  # before the next chunk has some
        ctx.gradients = dhidden, dweight
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # noqa: D102
        # Scaled where they are, and not held any longer, so that autograd takes them for its own instead of copying them: in
        # fp32 a gradient of the head is 2 GB with 128k tokens and 4,096 channels.
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        return (
            dhidden.mul_(grad).to(ctx.hidden_dtype) if ctx.needs_input_grad[0] else None,
            dweight.mul_(grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


def _chunk_loss(x: Tensor, w: Tensor, target: Tensor, counted: Tensor, *, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses of x (rows, D), each as often as `counted` (rows, 1) says, and its gradient by the logits
    (rows, V) if that is `wanted`.
    """
    logits = (x @ w.t()).float()  # (rows, V)
    index = target.clamp(min=0)[:, None]
    # One softmax, and log(sum(exp)) from its largest term: exp on its own costs more than all of this on CPU.
    p = torch.softmax(logits, -1)
    log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
    loss = ((log_sum - logits.gather(1, index)) * counted).sum()
    if not wanted:
        return loss, None
    del logits
    # d loss / d logits = softmax - one-hot, and 0 where nothing is learned
    return loss, p.scatter_add_(1, index, torch.full_like(log_sum, -1.0)).mul_(counted).to(x.dtype)
