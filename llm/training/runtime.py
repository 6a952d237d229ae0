"""What "auto" means in a training: resolved once, kept in its checkpoints, restored from them."""

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
from llm.layers.fused_attention import _cpu_fits
from llm.training.distributed.fsdp import Strategy
from llm.training.distributed.process_group import ProcessGroup

NOTES = "trained"  # in the cache folder: one empty file per shape of training that was compiled
# Measured on 2 cores, 2.5M to 29M parameters: layers compile in 21 to 24 s where the cache is empty, in 5 s from it; steps
# then take 5 to 10% less time, most where products are small. A GPU compiles longer and is faster, so it wants more work
# before it pays.
COLD_SECONDS = {"cpu": 20.0, "cuda": 45.0}
WARM_SECONDS = {"cpu": 5.0, "cuda": 10.0}
SAVED = {"cpu": 0.08, "cuda": 0.15}  # share of a training's time
SPEED = {"cpu": 2e11, "cuda": 1e14}  # floating-point operations per second, roughly: of a small model, where it is a question


def resolve_compile(wanted: bool | Literal["auto"], *, device: str, flops: float, shape: str) -> bool:
    """Whether to compile a training of `flops` operations; `shape` is a text that names all that compiling depends on."""
    if wanted != "auto":
        return wanted
    if device not in SPEED or not has_compiler(device):
        return False
    path = compiled_note(shape)
    cost = WARM_SECONDS if path is not None and path.exists() else COLD_SECONDS
    return flops / SPEED[device] * SAVED[device] > cost[device]


def compiled_note(shape: str) -> Path | None:
    """The file that says that a training of this shape has been compiled here; None where no folder is kept for that."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return None
    return Path(folder) / NOTES / hashlib.sha256(f"{torch.__version__} {shape}".encode()).hexdigest()


def note_compiled(shape: str) -> None:
    """Write it."""
    if path := compiled_note(shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# On 2 cores building takes 2 s, and steps of 2.6M and 29M parameters are 1.05 to 1.07 times as fast where a row is one
# document, more where it has several: it pays from 40 s on at the speed of a small model.
WORTH = 8e12  # floating-point operations of a training


def resolve_fused_attention(wanted: bool | Literal["auto"], *, device: str, precision: Precision, flops: float) -> bool:
    """Whether a training of `flops` operations should use the kernel; whether it works is seen when it is built."""
    if wanted != "auto":
        return wanted
    return device == "cpu" and precision == "bf16" and flops > WORTH and _cpu_fits()


# Positions of a micro-batch that is "auto", where they fit. On CPU, activations of more than this fall out of the cache; a GPU
# has enough to do with as many.
AUTO_TOKENS = {"cpu": 4096, "cuda": 65536}
SHRUNK = "micro-batch.json"  # in scratch: what a group that begins again after a shortage of memory may take at most


@dataclass(frozen=True)
class Runtime:
    """How a training is computed."""

    precision: Precision
    micro_batch: int  # rows
    processes: int
    threads: int
    device: str
    compiled: bool = False  # whether layers run as torch.compile makes them
    fused_attention: bool = False  # whether attention is that of `llm.layers.fused_attention`
    strategy: Strategy = "single"  # how processes share it


def resolve_runtime(
    group: ProcessGroup,
    micro_batch: int | Literal["auto"],
    precision: Literal["auto", "fp32", "bf16"],
    compiled: bool | Literal["auto"],
    fused_attention: bool | Literal["auto"],
    strategy: Literal["ddp", "fsdp"],
    *,
    cores: int,
    context: int,
    rows_per_step: int,
    flops: float,  # of the whole training
    shape: str,  # a text that names what compiling depends on, besides these runtime
) -> Runtime:
    """The runtime of a training that starts: what the recipe leaves open, this machine decides."""
    most = -(-rows_per_step // group.size)
    wanted = max(1, AUTO_TOKENS.get(group.device.type, 4096) // context) if micro_batch == "auto" else micro_batch
    rows = min(wanted, most)
    device = group.device.type
    resolved = resolve_precision(precision, device=group.device)
    strategy_here: Strategy = strategy if group.size > 1 else "single"
    if strategy_here == "fsdp" and compiled == "auto":
        compiled = False  # what it gains there was not measured, and a fault in one process would leave the others waiting
    shape = f"{shape} {context} {rows} {resolved} {device}"
    return Runtime(
        precision=resolved,
        micro_batch=rows,
        processes=group.size,
        threads=max(1, cores // group.size),
        device=device,
        compiled=group.from_main(resolve_compile(compiled, device=device, flops=flops / group.size, shape=shape)),
        fused_attention=group.from_main(
            resolve_fused_attention(fused_attention, device=device, precision=resolved, flops=flops / group.size)
        ),
        strategy=strategy_here,
    )


def is_plain(model: nn.Module) -> bool:
    """Whether compiling can pay at all: all weights learn, and no mask is drawn.

    Measured: with an adapter and its dropout, compiled layers are half as fast, since masks are computed again wherever they
    are used.
    """
    masked = any(isinstance(module, Dropout) and module.rate > 0 for module in model.modules())
    return not masked and all(weight.requires_grad for weight in model.parameters())


def restore_runtime(facts: dict[str, Any], group: ProcessGroup, strategy: Literal["ddp", "fsdp"], *, cores: int) -> Runtime:
    """The runtime of a checkpoint. Processes, strategy and device are this run's own; others are equal up to rounding."""
    kept = Runtime(**facts)
    if kept.processes != group.size:
        kept = replace(kept, processes=group.size, threads=max(1, cores // group.size))
    device = group.device.type
    fused = kept.fused_attention and device == "cpu"
    return replace(kept, device=device, fused_attention=fused, strategy=strategy if group.size > 1 else "single")


def layout(runtime: Runtime) -> str:
    """Processes, strategy and device, in words."""
    shared = "1 process" if runtime.processes == 1 else f"{runtime.processes} processes ({runtime.strategy})"
    return f"{shared} on {runtime.device}"


def limit_memory(scratch: Path, micro_batch: int) -> None:
    """Have the trainings that begin in `scratch` from now on take at most `micro_batch` rows at a time."""
    write_json(scratch / SHRUNK, micro_batch)


def with_memory_limit(runtime: Runtime, scratch: Path) -> Runtime:
    """`runtime` with no more rows than a shortage of memory before has left."""
    try:
        most = int(json.loads((scratch / SHRUNK).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return runtime
    return replace(runtime, micro_batch=min(runtime.micro_batch, most))
