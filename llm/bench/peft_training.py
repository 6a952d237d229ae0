"""Fine-tuning with an adapter as users of stock Transformers and PEFT write it, on the weights and rows of a workload."""

from typing import Any

import torch
from torch import nn

from llm.bench.implementations import build_transformers_model, rows_of
from llm.bench.workload import Workload
from llm.data.batch import Batch
from llm.device import Precision, autocast
from llm.models.interface import dtype_of
from llm.training.config import Optimizer
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

    def _loss(self, batch: Batch, total: float) -> Any:
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
