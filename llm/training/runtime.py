"""How a training is computed on this machine: what "auto" means, resolved once, kept in checkpoints and restored from them."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llm.device import Precision, has_compiler, resolve_precision
from llm.files import write_json
from llm.layers.dropout import Dropout
from llm.layers.fused_attention import is_cpu_supported
from llm.models.interface import LanguageModel, count_parameters
from llm.training.distributed.fsdp import Strategy
from llm.training.distributed.process_group import ProcessGroup
from llm.training.micro_batch import auto_rows
from llm.training.task import ComputeConfig, TrainingTask

MEMORY_LIMIT = "micro-batch.json"  # in scratch: the most rows that a group may take that starts again after memory ran out

# Measured on 2 cores, 2.5M to 29M parameters: layers compile in 21 to 24 s where the cache is empty, in 5 s from it; steps
# then take 5 to 10% less time, most where products are small. A GPU compiles longer and is faster, so it needs more work
# before it pays.
COLD_SECONDS = {"cpu": 20.0, "cuda": 45.0}
WARM_SECONDS = {"cpu": 5.0, "cuda": 10.0}
SAVED = {"cpu": 0.08, "cuda": 0.15}  # share of a training's time
SPEED = {"cpu": 2e11, "cuda": 1e14}  # floating-point operations per second, roughly: of a small model, where it is a question
NOTES = "trained"  # in the cache folder: one empty file per shape of training that was compiled

# On 2 cores building takes 2 s, and steps of 2.6M and 29M parameters are 1.05 to 1.07 times as fast where a row is one
# document, more where it has several: it pays from 40 s on at the speed of a small model.
WORTH = 8e12  # floating-point operations of a training from which on fused attention pays


@dataclass(frozen=True)
class Runtime:
    """How a training is computed: a ComputeConfig with nothing left open."""

    precision: Precision
    micro_batch: int  # rows
    processes: int
    threads: int
    device: str
    compiled: bool = False  # whether layers run as torch.compile makes them
    fused_attention: bool = False  # whether attention is that of `llm.layers.fused_attention`
    strategy: Strategy = "single"  # how processes share it
    muon_precision: Precision = "bf16"  # in which Muon orthogonalizes: what the machine is fast at, whatever the training's

    @property
    def layout(self) -> str:
        """Processes, strategy and device, in words."""
        shared = "1 process" if self.processes == 1 else f"{self.processes} processes ({self.strategy})"
        return f"{shared} on {self.device}"


def resolve_runtime(model: LanguageModel, task: TrainingTask, compute: ComputeConfig, *, group: ProcessGroup) -> Runtime:
    """The runtime of a training that starts, the same in every process."""
    context, device = task.rows.context, group.device.type
    wanted = compute.micro_batch
    if wanted == "auto":
        learned, parameters = count_parameters(model)
        each = model.flops_per_token(context)
        wanted = auto_rows(context, flops_per_token=each, adapter=2 * learned < parameters, device=device)
    rows = min(wanted, -(-task.rows_per_step // group.size))
    precision = _resolved_precision(compute.precision, group=group)
    strategy: Strategy = compute.strategy if group.size > 1 else "single"
    compiled = compute.compiled
    if compiled == "auto" and (strategy == "fsdp" or not is_plain(model)):
        compiled = False  # under fsdp its gain was not measured, and a fault in one process would leave the others waiting
    flops = task.steps * task.tokens_per_step * model.flops_per_token(context) / group.size
    runtime = Runtime(
        precision=precision,
        micro_batch=rows,
        processes=group.size,
        threads=_threads(compute, group=group),
        device=device,
        fused_attention=group.from_main(
            resolve_fused_attention(compute.fused_attention, device=device, precision=precision, flops=flops)
        ),
        strategy=strategy,
        muon_precision=_resolved_precision("auto", group=group),
    )
    shape = compiled_shape(model, context, runtime)
    return replace(runtime, compiled=group.from_main(resolve_compile(compiled, device=device, flops=flops, shape=shape)))


def restore_runtime(facts: dict[str, Any], compute: ComputeConfig, *, group: ProcessGroup) -> Runtime:
    """The runtime of a checkpoint. Processes, strategy and device are those of this run; the rest is kept."""
    kept = Runtime(**facts)
    if kept.processes != group.size:
        kept = replace(kept, processes=group.size, threads=_threads(compute, group=group))
    device = group.device.type
    return replace(
        kept,
        device=device,
        fused_attention=kept.fused_attention and device == "cpu",
        strategy=compute.strategy if group.size > 1 else "single",
    )


def _resolved_precision(wanted: Literal["auto", "fp32", "bf16"], *, group: ProcessGroup) -> Precision:
    """The precision of all processes: "auto" is bf16 where each of them is fast at it."""
    found = resolve_precision(wanted, device=group.device)
    return "bf16" if group.min(found == "bf16") == [1.0] else "fp32"


def _threads(compute: ComputeConfig, *, group: ProcessGroup) -> int:
    """Threads of each process, as many as every machine has cores for: a checkpoint keeps one number for all."""
    return int(group.min(max(1, compute.cores // group.size))[0])


def is_plain(model: nn.Module) -> bool:
    """Whether compiling can pay at all: all weights learn, and there is no dropout.

    Measured: with an adapter and its dropout, compiled layers are half as fast, since masks are computed again wherever they
    are used.
    """
    masked = any(isinstance(module, Dropout) and module.rate > 0 for module in model.modules())
    return not masked and all(weight.requires_grad for weight in model.parameters())


def resolve_compile(wanted: bool | Literal["auto"], *, device: str, flops: float, shape: str) -> bool:
    """Whether to compile a training of `flops` operations; `shape` is a text that names all that compiling depends on."""
    if wanted != "auto":
        return wanted
    if device not in SPEED or not has_compiler(device):
        return False
    path = compiled_note(shape)
    cost = WARM_SECONDS if path is not None and path.exists() else COLD_SECONDS
    return flops / SPEED[device] * SAVED[device] > cost[device]


def resolve_fused_attention(wanted: bool | Literal["auto"], *, device: str, precision: Precision, flops: float) -> bool:
    """Whether a training of `flops` operations should use the kernel; whether it works is known once it is built."""
    if wanted != "auto":
        return wanted
    return device == "cpu" and precision == "bf16" and flops > WORTH and is_cpu_supported()


def compiled_shape(model: nn.Module, context: int, runtime: Runtime) -> str:
    """What the code that torch.compile makes of `model` depends on, as a text; of a runtime that is not settled yet."""
    return f"{model} {context} {runtime.micro_batch} {runtime.precision} {runtime.device}"


def compiled_note(shape: str) -> Path | None:
    """The file that says that a training of this shape has been compiled here; None where no folder is kept for that."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return None
    return Path(folder) / NOTES / hashlib.sha256(f"{torch.__version__} {shape}".encode()).hexdigest()


def note_compiled(shape: str) -> None:
    """Write that file."""
    if path := compiled_note(shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def limit_memory(scratch: Path, micro_batch: int) -> None:
    """From now on, let trainings that start in `scratch` take at most `micro_batch` rows at a time."""
    write_json(scratch / MEMORY_LIMIT, micro_batch)


def with_memory_limit(runtime: Runtime, scratch: Path, *, group: ProcessGroup) -> Runtime:
    """`runtime` with at most as many rows as `limit_memory` allows in any process; machines need not share `scratch`."""
    try:
        most = int(json.loads((scratch / MEMORY_LIMIT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        most = runtime.micro_batch
    return replace(runtime, micro_batch=int(min(group.min(most, runtime.micro_batch))))
