"""The two that are compared: our training as `llm.training.trainer` runs it, and stock Transformers in the loop that its users write."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llm.adapters import lora
from llm.bench.workload import Workload
from llm.data.batch import IGNORE, Batch, PackedRow, RowSource
from llm.models import architectures
from llm.models.interface import LanguageModel
from llm.training.alerts.config import Alerts
from llm.training.alerts.monitor import AlertMonitor
from llm.training.config import Optimizer, Schedule
from llm.training.distributed.fsdp import shard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.dry_run import settle
from llm.training.loader import batches, most_batches
from llm.training.loss import Learner, next_token_loss
from llm.training.runtime import resolve_runtime
from llm.training.step import LOG_EVERY, Loop, Progress

SCHEDULE = Schedule(kind="constant", learning_rate=1e-3)
MANY = 2**31  # steps of a training that is never finished
PREPARED = 4  # steps whose batches are made beforehand
ALPHABET = 61  # different tokens of the text to learn
STRIDES = 3


@dataclass(frozen=True)
class CountingRows:
    """Rows of one document that counts in steps of 1 to 3: soon learned, so that the model is sure of what comes next.

    Not of the second token of a row, which is why no mean loss over its targets can be below ln 3 / (context - 1).
    """

    context: int
    vocab_size: int
    rows_per_epoch: int = MANY

    def row(self, index: int) -> PackedRow:
        """Row `index`; the stride shows only in two tokens together, so attention is needed to go on."""
        alphabet = min(ALPHABET, self.vocab_size)
        random = np.random.default_rng(index)
        tokens = (int(random.integers(alphabet)) + np.arange(self.context) * int(random.integers(1, STRIDES + 1))) % alphabet
        targets = np.append(tokens[1:], IGNORE)
        return PackedRow(tokens.astype(np.int64), targets.astype(np.int64), np.zeros(self.context, dtype=np.int32))


def build_stockpot_model(workload: Workload) -> LanguageModel:
    """Our model with fresh weights, the same ones every time."""
    torch.manual_seed(0)
    config = workload.architecture
    model = architectures()[config.name].build(config, vocab_size=workload.vocab_size)
    model.recompute = workload.recompute
    return model


def build_transformers_model(
    workload: Workload, weights: Mapping[str, Tensor] | None, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Transformers' model of the same architecture, with `weights` by name (None: fresh ones), as `from_pretrained` opens it
    in `dtype`: casting it afterwards would round its rotary frequencies, too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = architectures()[workload.architecture.name]
    fields = architecture.to_transformers(workload.architecture) | {"vocab_size": workload.vocab_size}
    del fields["model_type"], fields["architectures"]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # text that never ends
    config = AutoConfig.for_model(architecture.model_type, **fields, **special)
    make: Any = AutoModelForCausalLM.from_config  # its signature is untyped
    model: nn.Module = make(config, attn_implementation="sdpa", dtype=dtype)
    if weights is not None:
        model.load_state_dict(weights)
    if workload.recompute:
        model.gradient_checkpointing_enable()  # type: ignore[operator]  # every model of Transformers has it
    return model


class StockpotTraining:
    """Our training, put together as in `llm.training.trainer.train`: its Loop with what it would resolve_runtime, on batches made beforehand."""

    def __init__(
        self,
        workload: Workload,
        model: LanguageModel,
        *,
        optimizer: Optimizer,
        group: ProcessGroup,
        rows: RowSource | None = None,
        schedule: Schedule = SCHEDULE,
        steps: int = MANY,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        report: Callable[..., None] = lambda **values: None,
    ) -> None:
        self.workload, self.model, self.group = workload, model, group
        self.progress = Progress(steps=steps)
        self.rows = rows or CountingRows(workload.context, workload.vocab_size)
        began, auto = time.perf_counter(), workload.micro_batch == "auto"
        runtime = resolve_runtime(
            group,
            workload.micro_batch,
            workload.precision,
            workload.compiled,
            workload.fused_attention,
            strategy,
            cores=workload.cores,
            context=workload.context,
            rows_per_step=workload.rows,
            flops=math.inf,  # of a long training
            shape=f"{model} {workload.context}",
        )
        torch.set_num_threads(runtime.threads)
        learner = Learner(model, next_token_loss, precision=runtime.precision)
        learner = shard(learner, runtime.strategy, device=group.device, processes=group.size)
        self.runtime = settle(learner, self.rows, runtime, auto=auto, group=group, report=report)
        self.settling = time.perf_counter() - began  # seconds of compiling, if layers are compiled
        self.loop = Loop(
            learner,
            optimizer,
            schedule=schedule,
            seed=0,
            group=group,
            runtime=self.runtime,
            auto=auto,
            flops_per_token=model.flops_per_token(workload.context),
            monitor=AlertMonitor(Alerts(), warmup_steps=schedule.warmup_steps),
            report=report,
            should_stop=lambda: False,
        )
        self.rounds = most_batches(workload.rows, group, self.runtime.micro_batch)
        self.prepared = [self.load(step) for step in range(PREPARED)]

    def load(self, step: int) -> tuple[list[Batch], int]:
        """The micro-batches of one step, and how many targets they have: as `llm.training.loader` makes them."""
        count = self.workload.rows
        mine = range(self.group.rank, count, self.group.size)
        found = list(batches(self.rows, mine, self.runtime.micro_batch, first=step * count))
        (targets,) = self.group.sum(sum(int((batch.targets != IGNORE).sum()) for batch in found))
        return [batch.to(self.group.device) for batch in found], int(targets)

    def step(self) -> None:
        """One optimizer step; losses are collected as often as a training reports them."""
        self.take(*self.prepared[self.progress.step % PREPARED])
        if self.progress.step % LOG_EVERY == 0:
            self.loop.collect(self.progress)
            self.progress.recent = self.progress.recent[-1:]

    def take(self, parts: list[Batch], targets: int) -> None:
        """One optimizer step."""
        self.loop.step(self.progress, parts, targets=targets, rounds=self.rounds)
        self.progress.step += 1

    def last_loss(self) -> float:
        """Of the last step."""
        self.loop.collect(self.progress)
        return self.progress.recent[-1]

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean over the targets of `batch`, as training computes it but without dropout; nothing is learned."""
        total, targets = self.loop.learner.eval()(batch)
        return float(total / targets)


class TransformersTraining:
    """Stock Transformers with SDPA: loss from labels, backward, fused AdamW, zero_grad; neither clipping nor a schedule.

    `step("fp32")` computes in fp32, `step("bf16")` under autocast and `step("compiled")` under autocast and torch.compile, all
    three on one model and one optimizer. The cache of keys and values, which training does not need, is switched off.
    """

    def __init__(
        self, workload: Workload, weights: Mapping[str, Tensor] | None, *, steps: list[list[Batch]], device: torch.device
    ) -> None:
        settings = Optimizer()
        self.model = build_transformers_model(workload, weights).to(device).train()
        self.forwards: dict[str, Any] = {"fp32": self.model, "bf16": self.model}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=SCHEDULE.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._device, self._steps, self._done = device, steps, 0

    def step(self, how: str) -> None:
        """One optimizer step."""
        parts = self._steps[self._done % len(self._steps)]
        if how not in self.forwards:
            self.forwards[how] = torch.compile(self.model)
        for batch in parts:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=how != "fp32"):
                loss = self.forwards[how](input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
            (loss * (len(batch.tokens) / sum(len(part.tokens) for part in parts))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._done += 1

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean over the targets of `batch`, in fp32; nothing is learned."""
        return float(self.forwards["fp32"](input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss)


FULL, LORA, QLORA = "full", "lora", "qlora"
SETTINGS = lora.LoraConfig(r=8, alpha=16)  # what `lora` stages do by default: all linear layers


def training(workload: Workload, name: str, *, group: ProcessGroup) -> StockpotTraining:
    """Our training of one of the three."""
    model = build_stockpot_model(workload)
    if name == QLORA:
        lora.quantize(model.to(group.device), double=True)
    if name != FULL:
        lora.attach(model, SETTINGS, seed=0)
        workload = workload.model_copy(update={"compiled": False})  # as in a training: only where all weights learn
    adamw = workload.optimizer if workload.optimizer.kind == "adamw" else Optimizer()
    return StockpotTraining(workload, model, optimizer=adamw, group=group)
