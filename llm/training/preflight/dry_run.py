"""A forward and a backward pass on rows of the data: whether the layers compile, and how many rows fit in memory.

It leaves no gradient and draws no random number. What is found is part of the runtime, so it is kept in checkpoints, and a
training that goes on tries no more than what it was restored with.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from llm.data.batch import Batch, RowSource
from llm.device import is_out_of_memory
from llm.errors import InputError, MemoryShortageError
from llm.layers.cpp_kernel import UnavailableError
from llm.layers.dropout import set_counters
from llm.layers.fused_attention import LONGEST, PANEL, is_supported, load_kernel
from llm.models.interface import LanguageModel
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches
from llm.training.loss import Learner
from llm.training.preflight.memory_estimate import fitting_micro_batch, optimizer_bytes
from llm.training.runtime import Runtime


def settle(
    learner: Learner, rows: RowSource, runtime: Runtime, *, auto: bool, group: ProcessGroup, report: Callable[..., None]
) -> Runtime:
    """`runtime` with a micro-batch that fits, the same in every process, and compiled only if compiling works.

    The micro-batch is changed only where it is `auto`; InputError where not even one row fits, or not as many as the recipe
    asks for. Under "fsdp" there is no second try, since the others wait for a process that failed: a MemoryShortageError has
    to end them all.
    """
    model = learner.model
    runtime = _with_kernel(runtime, model, rows.context, group=group, report=report)
    model.fused_attention = runtime.fused_attention
    fitting = fitting_micro_batch(learner, rows, runtime.micro_batch, auto=auto, group=group)
    runtime = replace(runtime, micro_batch=fitting)
    while True:
        model.compiled = runtime.compiled
        batch = next(batches(rows, range(runtime.micro_batch), runtime.micro_batch)).to(group.device)
        full = failed = None
        try:
            _forward_and_backward(learner, batch)
        except Exception as error:
            if runtime.strategy == "fsdp":
                if is_out_of_memory(error):
                    raise shortage("before the first step", runtime, auto=auto, group=group, context=rows.context) from error
                raise
            if is_out_of_memory(error):
                full = error
            elif runtime.compiled:
                failed = error
            else:
                raise
        any_full, any_failed = group.sum(full is not None, failed is not None)
        if any_failed:
            reason = str(failed).strip().partition("\n")[0] if failed else "it failed in another process"
            report(note=f"torch.compile does not work here, so training goes on without it: {reason}")
            runtime = replace(runtime, compiled=False)
        elif any_full:
            runtime = replace(runtime, micro_batch=smaller(runtime.micro_batch, auto=auto, context=rows.context))
            report(note=f"memory ran out: tries micro_batch = {runtime.micro_batch}")
        else:
            return runtime


def _with_kernel(
    runtime: Runtime, model: LanguageModel, length: int, *, group: ProcessGroup, report: Callable[..., None]
) -> Runtime:
    """`runtime` with the attention kernel only if it fits and works in every process."""
    if not runtime.fused_attention:
        return runtime

    def tried() -> str | None:
        if runtime.device != "cpu":
            return f"expected a CPU, got {runtime.device}"
        heads, size = runtime.micro_batch * model.config.kv_heads, model.config.head_size
        if not is_supported(length, size, torch.bfloat16 if runtime.precision == "bf16" else torch.float32):
            return (
                f"expected bf16, rows of at most {LONGEST}, and rows and heads in multiples of {PANEL}, "
                f"got {runtime.precision}, {length}, {size}"
            )
        if heads < runtime.threads:
            return f"expected a head of keys for each of {runtime.threads} threads, got {heads} in a micro-batch"
        try:
            load_kernel()
        except UnavailableError as error:
            return str(error)
        return None

    reason = tried() if group.is_main else None  # the main process builds it, and the others find it built
    group.wait()
    if not group.is_main:
        reason = tried()
    if not group.sum(reason is not None)[0]:
        return runtime
    report(note=f"attention has no kernel here, so training goes on without it: {reason or 'another process has none'}")
    return replace(runtime, fused_attention=False)


def smaller(micro_batch: int, *, auto: bool, context: int) -> int:
    """Half of a micro-batch that did not fit, or an InputError."""
    if not auto:
        raise InputError(
            f'memory ran out with micro_batch = {micro_batch} rows of {context} positions; micro_batch = "auto" finds what '
            "fits, and recompute = true needs less"
        )
    if micro_batch == 1:
        raise InputError(
            f"memory ran out with a single row of {context} positions; recompute = true, a shorter context or a smaller "
            "architecture needs less"
        )
    return micro_batch // 2


def shortage(when: str, runtime: Runtime, *, auto: bool, group: ProcessGroup, context: int) -> MemoryShortageError:
    """The error of a process that cannot go on with a smaller micro-batch by itself; InputError where there is none."""
    micro_batch = smaller(runtime.micro_batch, auto=auto, context=context)
    process = f" in process {group.rank} of {group.size}" if group.size > 1 else ""
    return MemoryShortageError(
        f"memory ran out {when} with micro_batch = {runtime.micro_batch}{process}; micro_batch = {micro_batch} is next",
        micro_batch=micro_batch,
    )


def _forward_and_backward(learner: Learner, batch: Batch) -> None:
    learner.train()
    set_counters(learner.model, seed=0, step=0, rows=batch.rows)
    reserved = torch.empty(optimizer_bytes(learner), dtype=torch.uint8, device=batch.tokens.device)  # for the optimizer
    try:
        with torch.random.fork_rng(devices=[batch.tokens.device] if batch.tokens.is_cuda else []):
            loss, *_ = learner(batch)
            loss.backward()
    finally:
        del reserved
        learner.zero_grad()
