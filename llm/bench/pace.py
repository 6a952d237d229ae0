"""How fast this machine takes the steps of one training, and what they need: for a guess of its time, not for comparing."""

from typing import Any

from llm.bench.candidates import Ours, build_ours
from llm.bench.interleave import interleaved
from llm.bench.subject import Subject
from llm.group import Group
from llm.memory import peak_memory


def measure(subject: Subject, *, seconds: float, group: Group) -> dict[str, Any]:
    """Operations and tokens per second with the subject's own optimizer, and peak memory in bytes."""
    model = build_ours(subject)
    ours = Ours(subject, model, optimizer=subject.optimizer, group=group)
    timing = interleaved({"ours": ours.step}, seconds=seconds, device=group.device)["ours"]
    tokens = subject.tokens_per_step / timing.median
    return {
        "tokens_per_second": tokens,
        "flops_per_second": tokens * model.flops_per_token(subject.context),
        "peak_memory_bytes": peak_memory(str(group.device.type)),
    }
