"""Fine-tuning with an adapter: our step beside stock Transformers and PEFT on the same weights, rows and targets.

Stock packs as well as it can: rows of several chats with positions that begin anew, from which it makes a mask that keeps them
apart. All compute in the precision that the machine is fast at, take turns in one process, and have a process of their own for
their peak memory. Stock takes as many rows at a time as we do, and all rows of a step at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm.bench import memory
from llm.bench.implementations import StockpotTraining, build_learning_model, build_transformers_model, rows_of
from llm.bench.memory import ADAPTED, STOCK_ADAPTER
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.data.batch import Batch
from llm.device import Precision, autocast
from llm.models.interface import dtype_of
from llm.training.config import Optimizer
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches


class PeftTraining:
    """Stock Transformers with SDPA and PEFT's own layers: loss from labels, backward, fused AdamW, zero_grad."""

    def __init__(self, workload: Workload, *, steps: list[list[Batch]], precision: Precision, device: torch.device) -> None:
        import peft

        assert workload.adapter is not None
        adapter = dict(workload.adapter)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter["r"],
            lora_alpha=adapter["alpha"],
            lora_dropout=adapter.get("dropout", 0.0),
            target_modules=adapter.get("target_modules", "all-linear"),
            use_rslora=adapter.get("rslora", False),
            use_dora=adapter.get("dora", False),
            modules_to_save=list(adapter.get("modules_to_save", ())) or None,
        )
        base: Any = _stock_model(workload, precision)
        self.model: nn.Module = peft.get_peft_model(base, config).to(device).train()
        learned = [weight for weight in self.model.parameters() if weight.requires_grad]
        settings = Optimizer()
        self._optimizer = torch.optim.AdamW(
            learned, lr=1e-3, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=0.0, fused=True
        )
        self._steps, self._precision, self._device, self._done = steps, precision, device, 0

    def step(self) -> None:
        """One optimizer step."""
        parts = self._steps[self._done % len(self._steps)]
        total = sum(part.loss_count for part in parts)
        for part in parts:
            self._loss(part, total).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean over the targets of `batch`; nothing is learned."""
        return float(self._loss(batch, batch.loss_count))

    def _loss(self, batch: Batch, total: int) -> Any:
        with autocast(self._precision, device=self._device):
            return self.model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                labels=batch.targets,
                shift_labels=batch.targets,  # ours are shifted already
                num_items_in_batch=torch.tensor(total, device=self._device),
                use_cache=False,
            ).loss


def _stock_model(workload: Workload, precision: Precision) -> nn.Module:
    """The base as stock users open it, its weights in the precision of the training."""
    if workload.folder is None:
        return build_transformers_model(workload, None, dtype=dtype_of(precision))
    from transformers import AutoModelForCausalLM

    found: nn.Module = AutoModelForCausalLM.from_pretrained(
        workload.folder, dtype=dtype_of(precision), attn_implementation="sdpa", trust_remote_code=False
    )
    if workload.recompute:
        found.gradient_checkpointing_enable()  # type: ignore[operator]  # every model of Transformers has it
    return found


def stock_steps(workload: Workload, micro_batch: int, *, device: torch.device, count: int = 1) -> list[list[Batch]]:
    """The micro-batches of the first `count` steps."""
    rows = rows_of(workload)
    return [
        [part.to(device) for part in batches(rows, range(workload.rows), micro_batch, first=step * workload.rows)]
        for step in range(count)
    ]


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
