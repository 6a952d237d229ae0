"""Training speed: tokens/s of our step and of stock Transformers' on the same weights and rows, and the share of the peak.

Rows hold one document each, so that Transformers, which keeps no documents apart, computes the same. All use fused AdamW; ours
also clips gradients and follows a schedule. A product at the machine's peak takes turns with them, so that the share
compares what was measured side by side: the operations of a step (`flops_per_token`: matrix products with the head, without
the input embedding, and the visible half of attention) over its time and over that peak.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llm.bench.implementations import (
    FULL,
    StockpotTraining,
    TransformersTraining,
    build_learning_model,
    build_stockpot_model,
    build_stockpot_training,
)
from llm.bench.matmul import shown
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.device import peak_memory
from llm.training.distributed.process_group import ProcessGroup
from llm.training.mfu import Product

PEAK = "peak"


def measure_train_step(
    workload: Workload, peaks: dict[str, Any], *, seconds: float, compiled: bool, group: ProcessGroup
) -> dict[str, Any]:
    """The figures of each candidate, and what they have in common."""
    ours = build_stockpot_training(workload, FULL, group=group)
    steps = [parts for parts, _ in ours.prepared]
    theirs = TransformersTraining(workload, ours.model.state_dict(), steps=steps, device=group.device)
    first = ours.prepared[0][0][0]
    losses = {"ours": ours.loss(first), "transformers": theirs.loss(first)}
    precision = ours.runtime.precision
    shape = tuple(peaks[precision]["shape"])
    peak = Product(shape, precision, device=group.device)

    candidates: dict[str, Callable[[], None]] = {
        PEAK: peak,
        "ours": ours.step,
        "transformers_fp32": partial(theirs.step, "fp32"),
        "transformers_bf16": partial(theirs.step, "bf16"),
    }
    if compiled:
        candidates["transformers_bf16_compiled"] = partial(theirs.step, "compiled")
    build_seconds = {"ours": ours.build_seconds}
    if workload.optimizer.kind != "adamw":
        other = StockpotTraining(workload, build_stockpot_model(workload), group=group)
        candidates[f"ours_{workload.optimizer.kind}"] = other.step
    timings = interleaved(candidates, seconds=seconds, device=group.device)

    flops_per_token = ours.model.flops_per_token(workload.context)
    flops = flops_per_token * workload.tokens_per_step
    found: dict[str, Any] = {}
    for name in candidates:
        if name == PEAK:
            continue
        found[name] = {
            "tokens_per_second": workload.tokens_per_step / timings[name].median,
            "seconds_per_step": timings[name].median,
            "rounds": timings[name].rounds,
            "once_seconds": timings[name].once + build_seconds.get(name, 0.0),  # compilation, mostly
            "share_of_peak": flops / peak.flops * ratio(timings, PEAK, name),
        }
        if name.startswith("transformers"):
            found[name]["ours_times_as_fast"] = ratio(timings, name, "ours")
    return {
        "tokens_per_step": workload.tokens_per_step,
        "micro_batch": ours.runtime.micro_batch,
        "precision": precision,
        "compiled": ours.runtime.compiled,
        "fused_attention": ours.runtime.fused_attention,
        "first_loss": losses,  # equal weights and rows: equal up to rounding
        "flops_per_token": flops_per_token,
        "peak_gflops": [peak.flops / taken / 1e9 for taken in timings[PEAK].rounds],
        "peak_shape": shown(shape),
        "candidates": found,
    }


def measure_stockpot_step(workload: Workload, *, seconds: float, group: ProcessGroup) -> dict[str, Any]:
    """Operations and tokens per second of our step as the workload has it, adapter included, and peak memory in bytes."""
    ours = StockpotTraining(workload, build_learning_model(workload), group=group)
    timing = interleaved({"ours": ours.step}, seconds=seconds, device=group.device)["ours"]
    tokens = workload.tokens_per_step / timing.median
    return {
        "tokens_per_second": tokens,
        "flops_per_second": tokens * ours.model.flops_per_token(workload.context),
        "peak_memory_bytes": peak_memory(str(group.device.type)),
    }
