"""Learning per minute: held-out bits per byte after equal time, ours as a recipe trains it and a plain model with AdamW.

The plain one is stock Transformers' model of the same shape with its own initialization, bf16 autocast where ours has it, the
same rows in the same order, AdamW at 3e-3 and otherwise torch's defaults, gradients clipped to 1, the recipe's schedule.
Each takes as many steps as fit into the time at its own speed, measured on a throw-away copy; what is done once (compiling,
the sanity check) is part of our time. Both are measured by the same code on the same text, documents kept apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llm.bench.implementations import build_stockpot_model, build_transformers_model, compute_of
from llm.bench.workload import Workload
from llm.data.batch import IGNORE
from llm.data.token_rows import TokenRows
from llm.device import autocast, resolve_precision
from llm.training.config import Budget, Schedule
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import feed
from llm.training.loss import next_token_loss
from llm.training.runtime import Runtime
from llm.training.task import CheckpointConfig, TrainingTask
from llm.training.trainer import train
from llm.training.validation import Validation, validate_model

PLAIN_RATE = 3e-3
TRIAL_STEPS = 30  # to measure how many fit, after as many to warm up
SEED = 42


@dataclass(frozen=True)
class Text:
    """Folders of packed tokens to learn from and to be measured on."""

    train: Path
    held_out: Path

    def rows(self, context: int) -> TokenRows:
        """What is learned, the same for both."""
        return TokenRows(self.train, context=context, seed=SEED)

    def validation(self, context: int) -> Validation:
        """What is measured."""
        return Validation(TokenRows(self.held_out, context=context, seed=None))


def measure_learning(
    workload: Workload, text: Text, *, schedule: Schedule, seconds: float, scratch: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Steps, seconds and bits per byte of both, and the difference."""
    found: dict[str, Any] = {"seconds_wanted": seconds}
    for name, run in (("ours", _ours), ("plain", _plain)):
        found[name] = run(workload, text, schedule, seconds, scratch / name)
        say(f"{name}: {found[name]['bits_per_byte']:.3f} bits per byte after {found[name]['seconds']:.0f} s")
    found["bits_per_byte_below"] = found["plain"]["bits_per_byte"] - found["ours"]["bits_per_byte"]
    return found


def _ours(workload: Workload, text: Text, schedule: Schedule, seconds: float, scratch: Path) -> dict[str, Any]:
    def run(
        steps: int, folder: Path, *, check: bool = True, checked: Validation | None = None
    ) -> tuple[dict[str, Any], float]:
        torch.manual_seed(SEED)
        began = time.perf_counter()
        task = TrainingTask(
            next_token_loss,
            text.rows(workload.context),
            Budget(steps=steps),
            workload.tokens_per_step,
            schedule=schedule,
            optimizer=workload.optimizer,
            seed=SEED,
        )
        metrics = train(
            build_stockpot_model(workload),
            task,
            compute=compute_of(workload),
            checkpoints=CheckpointConfig(folder, keep=1),
            validation=checked,
            report=lambda **values: None,
            should_stop=lambda: False,
            check=check,
        )
        return metrics, time.perf_counter() - began

    _, once = run(TRIAL_STEPS, scratch / "first", check=False)  # with compilation
    _, begun = run(1, scratch / "second", check=False)
    _, taken = run(1 + TRIAL_STEPS, scratch / "third", check=False)
    per_step = (taken - begun) / TRIAL_STEPS
    start = max(begun, once - TRIAL_STEPS * per_step)
    steps = max(1, round((seconds - start) / per_step))
    metrics, _ = run(steps, scratch / "whole", checked=text.validation(workload.context))
    return {
        "steps": steps,
        "seconds": metrics["seconds"],
        "tokens": metrics["tokens"],
        "optimizer": workload.optimizer.kind,
        "compiled": metrics["choices"]["compiled"],
        "bits_per_byte": metrics["validation_bits_per_byte"],
    }


def _plain(workload: Workload, text: Text, schedule: Schedule, seconds: float, scratch: Path) -> dict[str, Any]:
    group = ProcessGroup()
    precision = resolve_precision(workload.precision, device=group.device)

    def run(model: nn.Module, limit: int, *, until: Schedule | None = None) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN_RATE, fused=True)
        micro_batch = workload.rows if workload.micro_batch == "auto" else workload.micro_batch
        steps = feed(text.rows(workload.context), group, micro_batch, workload.rows, range(limit))
        began = time.perf_counter()
        for step, (parts, targets) in enumerate(steps):
            if until is not None:
                optimizer.param_groups[0]["lr"] = PLAIN_RATE * until.factor(step, steps=limit)
            for batch in parts:
                with autocast(precision, device=group.device):
                    logits = model(input_ids=batch.tokens, use_cache=False).logits.flatten(0, 1)
                    loss = cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
                torch.autograd.backward(loss / targets)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    torch.manual_seed(SEED)
    trial = build_transformers_model(workload, None).to(group.device).train()
    run(trial, TRIAL_STEPS)
    steps = max(1, round(seconds / run(trial, TRIAL_STEPS) * TRIAL_STEPS))
    torch.manual_seed(SEED)
    model = build_transformers_model(workload, None).to(group.device).train()
    taken = run(model, steps, until=schedule)
    same = build_stockpot_model(workload)
    same.load_state_dict(model.state_dict())
    runtime = Runtime(precision, workload.rows, 1, workload.cores, group.device.type)
    held_out = text.validation(workload.context)
    scores = validate_model(same.eval(), held_out, runtime=runtime, should_stop=lambda: False)
    return {
        "steps": steps,
        "seconds": taken,
        "tokens": steps * workload.tokens_per_step,
        "optimizer": "adamw",
        "compiled": False,
        "bits_per_byte": scores["validation_bits_per_byte"],
    }
