"""What is compared: our training as `llm.training.trainer` runs it, and stock Transformers in a loop as its users write it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llm.adapters import lora
from llm.bench.workload import Workload
from llm.data.batch import IGNORE, Batch, PackedRow, RowSource
from llm.data.packing import PackedRows
from llm.models import architectures
from llm.models.checkpoint import load_checkpoint
from llm.models.interface import LanguageModel
from llm.training.build import build
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches, most_batches
from llm.training.loss import next_token_loss
from llm.training.runtime import resolve_runtime
from llm.training.step import LOG_EVERY, Progress
from llm.training.task import ComputeConfig, TrainingTask

SCHEDULE = Schedule(kind="constant", learning_rate=1e-3)
MANY = 2**31  # steps of a training that never ends
PREPARED = 4  # steps with batches made beforehand
ALPHABET = 61  # different tokens of the text to learn
STRIDES = 3
FULL, LORA, QLORA = WAYS = ("full", "lora", "qlora")  # which weights learn: all, an adapter, an adapter over four bits
ADAPTER = lora.LoraConfig(r=8, alpha=16)  # the defaults of `lora` stages: all linear layers


@dataclass(frozen=True)
class CountingRows:
    """Rows of one document that counts in steps of 1 to 3: quickly learned, so the model is sure of the next token.

    Except for the second token of a row: no mean loss over its targets can be below ln 3 / (context - 1).
    """

    context: int
    vocab_size: int
    rows_per_epoch: int = MANY

    def row(self, index: int) -> PackedRow:
        """Row `index`; the stride shows only in two tokens together, so predicting it needs attention."""
        alphabet = min(ALPHABET, self.vocab_size)
        random = np.random.default_rng(index)
        tokens = (int(random.integers(alphabet)) + np.arange(self.context) * int(random.integers(1, STRIDES + 1))) % alphabet
        targets = np.append(tokens[1:], IGNORE)
        return PackedRow(tokens.astype(np.int64), targets.astype(np.int64), np.zeros(self.context, dtype=np.int32))


def rows_of(workload: Workload) -> RowSource:
    """The packed chats of the workload, or made-up rows."""
    if workload.rows_folder is not None:
        return PackedRows(Path(workload.rows_folder), seed=0)
    return CountingRows(workload.context, workload.vocab_size)


def build_stockpot_model(workload: Workload) -> LanguageModel:
    """Our model with the weights of its folder, or fresh ones, the same at each call."""
    if workload.folder is not None:
        # What does not learn keeps its precision.
        model = load_checkpoint(Path(workload.folder), dtype=torch.float32 if workload.adapter is None else None)
    else:
        torch.manual_seed(0)
        config = workload.architecture
        model = architectures()[config.name].build(config, vocab_size=workload.vocab_size)
    model.recompute = workload.recompute
    return model


def build_learning_model(workload: Workload) -> LanguageModel:
    """Our model with what learns in it: all weights, or the adapter of the workload, over four bits if it says so."""
    model = build_stockpot_model(workload)
    if workload.adapter is not None:
        if workload.quantize:
            lora.quantize(model, double=True)
        lora.attach(model, lora.LoraConfig(**workload.adapter), seed=0)
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
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the text never ends
    config = AutoConfig.for_model(architecture.model_type, **fields, **special)
    make: Any = AutoModelForCausalLM.from_config  # its signature is untyped
    model: nn.Module = make(config, attn_implementation="sdpa", dtype=dtype)
    if weights is not None:
        model.load_state_dict(weights)
    if workload.recompute:
        model.gradient_checkpointing_enable()  # type: ignore[operator]  # every model of Transformers has it
    return model


class StockpotTraining:
    """Our training, built as `llm.training.trainer.train` builds it, on batches that are made beforehand."""

    def __init__(
        self,
        workload: Workload,
        model: LanguageModel,
        *,
        group: ProcessGroup,
        rows: RowSource | None = None,
        schedule: Schedule = SCHEDULE,
        steps: int = MANY,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        report: Callable[..., None] = lambda **values: None,
    ) -> None:
        self.workload, self.model, self.group = workload, model, group
        self.progress = Progress(steps=steps)
        rows = rows or rows_of(workload)
        budget = Budget(steps=steps)
        self.task = TrainingTask(
            next_token_loss, rows, budget, workload.tokens_per_step, schedule=schedule, optimizer=workload.optimizer, seed=0
        )
        compute = compute_of(workload, strategy=strategy)
        began, auto = time.perf_counter(), workload.micro_batch == "auto"
        runtime = resolve_runtime(model, self.task, compute, group=group)
        torch.set_num_threads(runtime.threads)
        self.loop = build(model, self.task, runtime, auto=auto, group=group, report=report, should_stop=lambda: False)
        self.build_seconds = time.perf_counter() - began  # of compiling, mostly, if layers are compiled
        self.runtime = self.loop.runtime
        self.rounds = most_batches(workload.rows, group, self.runtime.micro_batch)
        self.prepared = [self.load(step) for step in range(PREPARED)]

    def load(self, step: int) -> tuple[list[Batch], int]:
        """The micro-batches of one step as `llm.training.loader` makes them, and the number of targets of all processes."""
        count = self.workload.rows
        mine = range(self.group.rank, count, self.group.size)
        found = list(batches(self.task.rows, mine, self.runtime.micro_batch, first=step * count))
        (targets,) = self.group.sum(sum(int((batch.targets != IGNORE).sum()) for batch in found))
        return [batch.to(self.group.device) for batch in found], int(targets)

    def step(self) -> None:
        """One optimizer step on a prepared batch; losses are collected as often as a training reports them."""
        self.step_on(*self.prepared[self.progress.step % PREPARED])
        if self.progress.step % LOG_EVERY == 0:
            self.loop.collect(self.progress)
            self.progress.recent = self.progress.recent[-1:]

    def step_on(self, parts: list[Batch], targets: int) -> None:
        """One optimizer step on these micro-batches."""
        self.loop.step(self.progress, parts, targets=targets, rounds=self.rounds)
        self.progress.step += 1

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean over the targets of `batch`, as training computes it but without dropout; nothing is learned."""
        total, targets = self.loop.learner.eval()(batch)
        return float(total / targets)


def compute_of(workload: Workload, *, strategy: Literal["ddp", "fsdp"] = "ddp") -> ComputeConfig:
    """How our training of `workload` is computed."""
    shared = {"cores", "micro_batch", "precision", "compiled", "fused_attention"}
    return ComputeConfig(**workload.model_dump(include=shared), strategy=strategy)


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


def build_stockpot_training(workload: Workload, way: str, *, group: ProcessGroup) -> StockpotTraining:
    """Our training of a fresh model with AdamW, by one of WAYS."""
    model = build_stockpot_model(workload)
    if way == QLORA:
        lora.quantize(model.to(group.device), double=True)
    if way != FULL:
        lora.attach(model, ADAPTER, seed=0)
    if workload.optimizer.kind != "adamw":
        workload = workload.model_copy(update={"optimizer": Optimizer()})
    return StockpotTraining(workload, model, group=group)
