"""Training speed: tokens/s of our step and of stock Transformers' on the same weights and rows, and the share of the peak.

Rows hold one document each, so that Transformers, which keeps no documents apart, computes the same. All use fused AdamW; ours
clips gradients and follows a schedule besides. A product at the machine's peak takes turns with them, so that the share
compares what was measured side by side: the operations of a step (`flops_per_token`: matrix products with the head, without
the input embedding, and the visible half of attention) over its time and over that peak.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llm.bench.implementations import Ours, Theirs, build_ours
from llm.bench.matmul import shown
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Subject
from llm.device import peak_memory
from llm.training.config import Optimizer
from llm.training.mfu import Product
from llm.training.process_group import Group

PEAK = "peak"


def measure(subject: Subject, peaks: dict[str, Any], *, seconds: float, compiled: bool, group: Group) -> dict[str, Any]:
    """The figures, by candidate."""
    model = build_ours(subject)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    adamw = subject.optimizer if subject.optimizer.kind == "adamw" else Optimizer()
    ours = Ours(subject, model, optimizer=adamw, group=group)
    theirs = Theirs(subject, weights, steps=[parts for parts, _ in ours.prepared], device=group.device)
    first = ours.prepared[0][0][0]
    losses = {"ours": ours.loss(first), "transformers": theirs.loss(first)}
    precision = ours.choices.precision
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
    settling = {"ours": ours.settling}
    if subject.optimizer.kind != "adamw":
        other = Ours(subject, build_ours(subject), optimizer=subject.optimizer, group=group)
        candidates[f"ours_{subject.optimizer.kind}"] = other.step
    timings = interleaved(candidates, seconds=seconds, device=group.device)

    flops = model.flops_per_token(subject.context) * subject.tokens_per_step
    found: dict[str, Any] = {}
    for name in candidates:
        if name == PEAK:
            continue
        found[name] = {
            "tokens_per_second": subject.tokens_per_step / timings[name].median,
            "seconds_per_step": timings[name].median,
            "rounds": timings[name].rounds,
            "once_seconds": timings[name].once + settling.get(name, 0.0),  # compilation, mostly
            "share_of_peak": flops / peak.flops * ratio(timings, PEAK, name),
        }
        if name.startswith("transformers"):
            found[name]["ours_times_as_fast"] = ratio(timings, name, "ours")
    return {
        "tokens_per_step": subject.tokens_per_step,
        "micro_batch": ours.choices.micro_batch,
        "precision": precision,
        "compiled": ours.choices.compiled,  # ours
        "fused_attention": ours.choices.fused_attention,
        "first_loss": losses,  # equal weights and rows: equal up to rounding
        "flops_per_token": model.flops_per_token(subject.context),
        "peak_gflops": [peak.flops / taken / 1e9 for taken in timings[PEAK].rounds],
        "peak_shape": shown(shape),
        "candidates": found,
    }


def measure_ours(subject: Subject, *, seconds: float, group: Group) -> dict[str, Any]:
    """Operations and tokens per second with the subject's own optimizer, and peak memory in bytes."""
    model = build_ours(subject)
    ours = Ours(subject, model, optimizer=subject.optimizer, group=group)
    timing = interleaved({"ours": ours.step}, seconds=seconds, device=group.device)["ours"]
    tokens = subject.tokens_per_step / timing.median
    return {
        "tokens_per_second": tokens,
        "flops_per_second": tokens * model.flops_per_token(subject.context),
        "peak_memory_bytes": peak_memory(str(group.device.type)),
    }
