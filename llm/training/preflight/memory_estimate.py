"""What a step will need of main memory, foretold from short rows: whether it fits is known before a full row is computed.

A GPU says when it is full. Main memory is promised first and missing later, when the system swaps for minutes or kills the
process. What a forward pass keeps is a line in the length of a row, so rows of two short lengths give it.

Letters: T positions of a row.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from llm.data.batch import Batch, RowSource
from llm.device import free_memory, is_out_of_memory
from llm.errors import InputError
from llm.layers.dropout import set_counters
from llm.training.distributed.fsdp import is_sharded, local_part, reshard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches
from llm.training.loss import Learner

SPARE = 0.8  # share of the free memory that activations may take, where the micro-batch is "auto"
MEASURED_WHOLE = 1024  # T up to which a row is measured as it is; the attention kernel's memory is no line, but it ends here
SHORT, LONGER = 256, 512  # T of the rows that longer ones are foretold from


def fitting_micro_batch(learner: Learner, rows: RowSource, micro_batch: int, *, auto: bool, group: ProcessGroup) -> int:
    """At most `micro_batch` rows, and as many as fit in free memory by what they keep for the backward pass.

    InputError where not even one row fits, or not as many as asked for: what is kept is less than the peak. Only main memory
    is foretold, and a GPU's under "fsdp", where there is only one try.
    """
    if group.device.type != "cpu" and not is_sharded(learner):
        return micro_batch
    try:
        needed = _row_bytes(learner, rows, group=group)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or is_sharded(learner):  # then the others wait for this process
            raise
        needed = math.inf  # the try that follows says what to do
    sharing = group.size if group.device.type == "cpu" else 1
    free, state = free_memory(group.device) / sharing, optimizer_bytes(learner)
    wanted = 1 if auto else micro_batch
    total = state + wanted * needed
    left = free - total if math.isfinite(total) else 0.0
    left, comfortable = group.min(left, (SPARE * free - state) / max(1.0, needed))
    if left < 0:
        less = "" if learner.model.recompute else "recompute = true, "
        fewer = "" if wanted == 1 else 'micro_batch = "auto", '
        raise InputError(
            f"{wanted} row{'s' if wanted > 1 else ''} of {rows.context} positions: expected a training step within the "
            f"{free / 2**30:.1f} GiB of memory that are free, got a need of about {total / 2**30:.1f} GiB; {less}{fewer}"
            "a shorter context or a smaller architecture needs less"
        )
    return int(max(1.0, min(float(micro_batch), comfortable))) if auto else micro_batch


def optimizer_bytes(learner: Learner) -> int:
    """The most that an optimizer keeps: two numbers for each weight that learns."""
    return sum(2 * local_part(weight.detach()).nbytes for weight in learner.parameters() if weight.requires_grad)


def _row_bytes(learner: Learner, rows: RowSource, *, group: ProcessGroup) -> float:
    """Bytes that the forward pass of one row keeps."""
    row = next(batches(rows, range(1), 1))
    if rows.context <= MEASURED_WHOLE:
        return float(_kept_for_backward(learner, _cut(row, rows.context).to(group.device)))
    short, longer = (_kept_for_backward(learner, _cut(row, length).to(group.device)) for length in (SHORT, LONGER))
    return longer + (longer - short) / (LONGER - SHORT) * (rows.context - LONGER)


def _cut(row: Batch, length: int) -> Batch:
    """The first `length` positions, all with a target, as two documents, which may be a pair of preferences."""
    tokens, positions = row.tokens[:, :length], torch.arange(length)[None]
    return replace(
        row,
        tokens=tokens,
        targets=tokens,
        positions=positions,
        documents=(positions * 2 // length).int(),
        reference=None if row.reference is None else row.reference[:, :length],
    )


def _kept_for_backward(learner: Learner, batch: Batch) -> int:
    """Bytes that the forward pass of `batch` keeps, besides the weights."""
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    learner.train()
    set_counters(learner.model, seed=0, step=0, rows=batch.rows)
    devices = [batch.tokens.device] if batch.tokens.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        learner(batch)
    weights = {local_part(weight.detach()).untyped_storage().data_ptr() for weight in learner.parameters()}
    # Gathered weights are freed by now: they count nothing.
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    reshard(learner)
    return found
