"""Fine-tuning with an adapter: our step beside stock Transformers and PEFT on the same weights, rows and targets.

Stock packs as well as it can: rows of several chats with positions that begin anew, from which it makes a mask that keeps them
apart. All compute in the precision that the machine is fast at, take turns in one process, and have a process of their own for
their peak memory. Stock takes as many rows at a time as we do, and all rows of a step at once.
"""

from collections.abc import Callable
from typing import Any

from llm.bench.costs import memory
from llm.bench.costs.memory import ADAPTED, STOCK_ADAPTER
from llm.bench.implementations import StockpotTraining, build_learning_model
from llm.bench.peft_training import PeftTraining, stock_steps
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.training.distributed.process_group import ProcessGroup


def measure_peft(workload: Workload, *, seconds: float, group: ProcessGroup) -> dict[str, Any]:
    """Tokens per second and peak bytes of each; how many times as fast ours is, and its share of the memory."""
    ours = StockpotTraining(workload, build_learning_model(workload), group=group)
    precision, micro_batch = ours.runtime.precision, ours.runtime.micro_batch
    sizes = list(dict.fromkeys([micro_batch, workload.rows]))
    candidates: dict[str, Callable[[], None]] = {ADAPTED: ours.step}
    theirs = {}
    for size in sizes:
        steps = stock_steps(workload, size, device=group.device, count=len(ours.prepared))
        theirs[size] = PeftTraining(workload, steps=steps, precision=precision, device=group.device)
        candidates[f"{STOCK_ADAPTER}{size}"] = theirs[size].step
    first = ours.prepared[0][0][0]
    losses = {"ours": ours.loss(first), "transformers": theirs[micro_batch].loss(first)}
    timings = interleaved(candidates, seconds=seconds, device=group.device)
    peaks = {name: memory.peak_in_process(name, workload)[0] for name in candidates}
    found: dict[str, Any] = {}
    for name in candidates:
        found[name] = {
            "rows_at_a_time": int(name.removeprefix(STOCK_ADAPTER)) if name != ADAPTED else micro_batch,
            "tokens_per_second": workload.tokens_per_step / timings[name].median,
            "rounds": timings[name].rounds,
            "peak_memory_bytes": peaks[name],
        }
        if name != ADAPTED:
            found[name] |= {
                "ours_times_as_fast": ratio(timings, name, ADAPTED),
                "our_share_of_memory": peaks[ADAPTED] / peaks[name],
            }
    real = sum(batch.loss_count for batch in ours.prepared[0][0])
    return {
        "precision": precision,
        "r": workload.adapter["r"] if workload.adapter else None,
        "rows": workload.rows,
        "targets_of_a_step": real,
        "first_loss": losses,
        "candidates": found,
    }
