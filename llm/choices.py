"""What "auto" means in a training: resolved once, kept in its checkpoints, restored from them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from llm.compilation import resolve_compile
from llm.dropout import Dropout
from llm.files import write_json
from llm.fused_attention import resolve_fused_attention
from llm.group import Group
from llm.precision import Precision, resolve_precision
from llm.sharding import Strategy

# Positions of a micro-batch that is "auto", where they fit. On CPU, activations of more than this fall out of the cache; a GPU
# has enough to do with as many.
AUTO_TOKENS = {"cpu": 4096, "cuda": 65536}
SHRUNK = "micro-batch.json"  # in scratch: what a group that begins again after a shortage of memory may take at most


@dataclass(frozen=True)
class Choices:
    """How a training is computed."""

    precision: Precision
    micro_batch: int  # rows
    processes: int
    threads: int
    device: str
    compiled: bool = False  # whether layers run as torch.compile makes them
    fused_attention: bool = False  # whether attention is that of `llm.fused_attention`
    strategy: Strategy = "single"  # how processes share it


def choose(
    group: Group,
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
    shape: str,  # a text that names what compiling depends on, besides these choices
) -> Choices:
    """The choices of a training that starts: what the recipe leaves open, this machine decides."""
    most = -(-rows_per_step // group.size)
    wanted = max(1, AUTO_TOKENS.get(group.device.type, 4096) // context) if micro_batch == "auto" else micro_batch
    rows = min(wanted, most)
    device = group.device.type
    resolved = resolve_precision(precision, device=group.device)
    strategy_here: Strategy = strategy if group.size > 1 else "single"
    if strategy_here == "fsdp" and compiled == "auto":
        compiled = False  # what it gains there was not measured, and a fault in one process would leave the others waiting
    shape = f"{shape} {context} {rows} {resolved} {device}"
    return Choices(
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


def restored(facts: dict[str, Any], group: Group, strategy: Literal["ddp", "fsdp"], *, cores: int) -> Choices:
    """The choices of a checkpoint. Processes, strategy and device are this run's own; others are equal up to rounding."""
    kept = Choices(**facts)
    if kept.processes != group.size:
        kept = replace(kept, processes=group.size, threads=max(1, cores // group.size))
    device = group.device.type
    fused = kept.fused_attention and device == "cpu"
    return replace(kept, device=device, fused_attention=fused, strategy=strategy if group.size > 1 else "single")


def layout(choices: Choices) -> str:
    """Processes, strategy and device, in words."""
    shared = "1 process" if choices.processes == 1 else f"{choices.processes} processes ({choices.strategy})"
    return f"{shared} on {choices.device}"


def shrink(scratch: Path, micro_batch: int) -> None:
    """Have the trainings that begin in `scratch` from now on take at most `micro_batch` rows at a time."""
    write_json(scratch / SHRUNK, micro_batch)


def shrunk(choices: Choices, scratch: Path) -> Choices:
    """`choices` with no more rows than a shortage of memory before has left."""
    try:
        most = int(json.loads((scratch / SHRUNK).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return choices
    return replace(choices, micro_batch=min(choices.micro_batch, most))
