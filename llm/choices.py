"""What "auto" means in a training: resolved once, kept in its checkpoints, restored from them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from llm.group import Group
from llm.precision import Precision, resolve_precision

# Positions of a micro-batch that is "auto". On CPU, activations of more than this fall out of the cache.
AUTO_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Choices:
    """How a training is computed."""

    precision: Precision
    micro_batch: int  # rows
    processes: int
    threads: int
    device: str


def choose(
    group: Group,
    micro_batch: int | Literal["auto"],
    precision: Literal["auto", "fp32", "bf16"],
    *,
    cores: int,
    context: int,
    rows_per_step: int,
) -> Choices:
    """The choices of a training that starts: what the recipe leaves open, this machine decides."""
    most = -(-rows_per_step // group.size)
    wanted = max(1, AUTO_TOKENS.get(group.device.type, 4096) // context) if micro_batch == "auto" else micro_batch
    return Choices(
        precision=resolve_precision(precision, device=group.device),
        micro_batch=min(wanted, most),
        processes=group.size,
        threads=max(1, cores // group.size),
        device=group.device.type,
    )


def restored(facts: dict[str, Any], group: Group, *, cores: int) -> Choices:
    """The choices of a checkpoint. Processes and device are what this run was started in; others are equal up to rounding."""
    kept = Choices(**facts)
    if kept.processes != group.size:
        kept = replace(kept, processes=group.size, threads=max(1, cores // group.size))
    return replace(kept, device=group.device.type)
